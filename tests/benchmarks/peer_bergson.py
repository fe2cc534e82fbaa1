"""bergson's side of peers.py. Its environment:

    python -m venv bergson && . bergson/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0 jinja2 jaxtyping ml_dtypes \
        natsort numpy scipy petname pyarrow pyyaml simple-parsing
    pip install --no-deps bergson==2.5.1 peft torchopt

Its own steps are called as its pipeline calls them, less the tokenising: factors with eigenvalue correction, query
gradients, their product with the damped inverse (0.1 × mean eigenvalue), scores. Everything goes through files.
"""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import torch
from bergson.build import build_worker
from bergson.config.config import HessianConfig, IndexConfig, InversionConfig, PreprocessConfig, ScoreConfig
from bergson.data import load_scores
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.hessians.hessian_approximations import hessian_worker
from bergson.score.score import score_worker
from datasets import Dataset
from peer import BATCH, serve

ONE = (0, 0, 1)  # rank, local rank, world size


def dataset(ids):
    return Dataset.from_dict({"input_ids": [x.tolist() for x in ids], "length": [len(x) for x in ids]})


class Bergson:
    def __init__(self, problem):
        self.train, self.queries = dataset(problem.train), dataset(problem.queries)
        self.folder, self.model, self.n = None, problem.folder, len(problem.queries)
        self.precision = {torch.float64: "fp64", torch.float32: "fp32"}[problem.model().dtype]
        self.longest = max(len(x) for x in problem.train + problem.queries)
        linear = {name for name, module in problem.model().base_model.named_modules()
                  if isinstance(module, torch.nn.Linear)}
        prefix = problem.model().base_model_prefix + "."
        self.others = ",".join(linear - {name.removeprefix(prefix) for name in problem.layers})

    def config(self, step, **more):
        shutil.rmtree(f"{self.folder.name}/{step}.part", ignore_errors=True)
        config = IndexConfig(f"{self.folder.name}/{step}", model=str(self.model), precision=self.precision,
                             include_bias=True, filter_modules=self.others, loss_reduction="sum",
                             token_batch_size=BATCH * self.longest, max_batch_size=BATCH, **more)
        config.partial_run_path.mkdir(parents=True)
        return config

    def fit(self, labels):
        self.folder = tempfile.TemporaryDirectory()
        hessian = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=labels == "true",
                                hessian_dtype=self.precision)
        with contextlib.redirect_stdout(io.StringIO()):
            hessian_worker(*ONE, self.config("factors"), hessian, self.train)

    def scores(self, per):
        with contextlib.redirect_stdout(io.StringIO()):
            build_worker(*ONE, self.config("queries"), PreprocessConfig(), self.queries)
            shutil.rmtree(f"{self.folder.name}/turned", ignore_errors=True)
            apply_worker(*ONE, EkfacConfig(f"{self.folder.name}/factors.part", f"{self.folder.name}/queries.part",
                                           f"{self.folder.name}/turned", True),
                         InversionConfig("damped_inverse", 0.1))
            config = self.config("scores", attribute_tokens=per == "token")
            score_worker(*ONE, config, ScoreConfig(f"{self.folder.name}/turned"), PreprocessConfig(), self.train)
        scores = load_scores(Path(config.partial_run_path))
        if per == "token":
            return scores.to_grid().view(len(self.train), -1, self.n).permute(2, 0, 1)
        return torch.as_tensor(scores[:]).T


if __name__ == "__main__":
    serve(Bergson)
