"""pyDVL's side of peers.py. Its environment:

    python -m venv pydvl && . pydvl/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 "numpy<2" && pip install --no-deps pydvl==0.10.0
    pip install pyDeprecate more-itertools pandas scikit-learn scipy joblib cloudpickle psutil tqdm matplotlib \
        typing-extensions "numcodecs<0.16" dask distributed "zarr<4,>=3" "numpy<2" cvxpy

EkfacInfluence is for classifiers: one input tensor, logits [B, C, ...], a mean loss, no mask. The language model is
wrapped to look like that, positions being the trailing axis; the scores of mean losses are multiplied by the numbers
of targets on both sides. It cannot take labels for the factors (their gradient is that of Σ √p log p, neither the true
nor the empirical Fisher), and it has one damping for all layers: `DAMPING`.
"""

import torch
from peer import batches, collate, serve
from pydvl.influence.torch import EkfacInfluence
from torch.utils.data import DataLoader

DAMPING = 0.01


class Classifier(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2)


class PyDVL:
    def __init__(self, problem):
        model = problem.model()
        model.set_attn_implementation("eager")  # what vmap can follow
        model.requires_grad_(False)
        for name in problem.layers:
            model.get_submodule(name).requires_grad_(True)
        self.model = Classifier(model)
        self.train, self.queries = batches(problem.train), collate(problem.queries)

    def fit(self, labels):
        self.influence = EkfacInfluence(self.model, update_diagonal=True, hessian_regularization=DAMPING)
        data = [(batch["input_ids"], batch["labels"]) for batch in self.train]
        self.influence.fit(DataLoader(data, batch_size=None))

    def scores(self, per):
        if per == "token":
            raise NotImplementedError("pyDVL has no token scores")
        count = lambda batch: (batch["labels"][:, 1:] != -100).sum(1)
        factors = self.influence.influence_factors(self.queries["input_ids"], self.queries["labels"][:, 1:])
        parts = [self.influence.influences_from_factors(factors, batch["input_ids"], batch["labels"][:, 1:])
                 * count(self.queries)[:, None] * count(batch) for batch in self.train]
        return torch.cat(parts, 1)


if __name__ == "__main__":
    serve(PyDVL)
