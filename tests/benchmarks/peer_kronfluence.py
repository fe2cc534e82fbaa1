"""kronfluence's side of peers.py. Its environment:

    python -m venv kronfluence && . kronfluence/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 && pip install --no-deps kronfluence==1.0.1
    pip install accelerate opt_einsum einconv einops safetensors tqdm datasets pandas

Its torchvision dependency is left out on purpose: beside a CPU build of torch it breaks the import of transformers.
"""

import tempfile
from functools import partial

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from peer import BATCH, collate, serve


class LanguageTask(Task):
    """The summed next-token loss; pseudo-labels are drawn as kronfluence's own examples draw them."""

    def __init__(self, layers):
        self.layers = layers

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logits, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1).flatten()
                labels = torch.where(labels == -100, labels, drawn)
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.layers

    def get_attention_mask(self, batch):
        return batch["attention_mask"]


class Kronfluence:
    """fit, scores and token scores of kronfluence, each from files in a temporary folder of its own."""

    def __init__(self, model, layers, train, queries):
        """train, queries: lists of token ids [T]."""
        self.train, self.queries, self.folder = train, queries, None
        self.task, dtype = LanguageTask(layers), next(model.parameters()).dtype  # float64 for a model in float64
        names = ("activation_covariance", "gradient_covariance", "lambda", "per_sample_gradient")
        self.factor_dtypes = {f"{name}_dtype": dtype for name in names}
        self.score_dtypes = {f"{name}_dtype": dtype for name in ("score", "per_sample_gradient", "precondition")}
        self.model = prepare_model(model, self.task)

    def analyzer(self, width=0):
        analyzer = Analyzer("peers", self.model, self.task, cpu=True, disable_tqdm=True, log_level=40,
                            output_dir=self.folder.name)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=partial(collate, width=width)))
        return analyzer

    def fit(self, labels):
        self.folder = tempfile.TemporaryDirectory()
        self.analyzer().fit_all_factors("factors", self.train, per_device_batch_size=BATCH,
                                        factor_args=FactorArguments(use_empirical_fisher=labels == "true",
                                                                    **self.factor_dtypes))

    def scores(self, per):
        longest = max(len(ids) for ids in self.train)  # its token scores must all have one width
        analyzer = self.analyzer(longest if per == "token" else 0)
        args = ScoreArguments(damping_factor=None, compute_per_token_scores=per == "token", **self.score_dtypes)
        analyzer.compute_pairwise_scores(per, "factors", self.queries, self.train, len(self.queries), BATCH,
                                         score_args=args, overwrite_output_dir=True)
        return analyzer.load_pairwise_scores(per)["all_modules"]


if __name__ == "__main__":
    serve(lambda problem: Kronfluence(problem.model(), problem.layers, problem.train, problem.queries))
