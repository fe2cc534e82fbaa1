"""dattri's side of peers.py. Its environment:

    python -m venv dattri && . dattri/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 numpy scipy pyyaml tqdm && pip install --no-deps dattri==0.3.0

Its EK-FAC stops at inputs with a token axis, so peers.py can only record that. What it can do, a classifier of single
vectors, is held to the dense reference by `python peer_dattri.py`: as it is, with its eigenvectors transposed
(it multiplies by Qᵀ where columns are eigenvectors), and that for a network without biases and for one with them.
"""

import sys

import torch
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.func import fisher
from dattri.task import AttributionTask
from dense import difference, scores
from peer import collate, serve
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

DAMPING = 0.01


def attributor(model, layers, loss):
    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    return IFAttributorEKFAC(task, module_name=layers, damping=DAMPING)


class Dattri:
    def __init__(self, problem):
        self.model, self.layers = problem.model(), problem.layers
        self.train, self.queries = (collate(ids) for ids in (problem.train, problem.queries))

    def fit(self, labels):
        def loss(params, data):
            ids, labels = data
            logits = functional_call(self.model, params, (ids,), {"use_cache": False}).logits[:, :-1].transpose(1, 2)
            return torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="sum") / len(ids)

        data = DataLoader(TensorDataset(self.train["input_ids"], self.train["labels"]), batch_size=16)
        self.attributor = attributor(self.model, self.layers, loss)
        self.attributor.cache(data)

    def scores(self, per):
        raise NotImplementedError("dattri fits no EK-FAC factors of a language model")


def classifier(bias, transposed):
    """Largest ‖Δ‖/‖score‖ of a query between dattri and the dense reference, on vectors and a network of two layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7, bias), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias)).double()
    x, y = torch.randn(40, 5).double(), torch.randint(3, (40,))
    plain = fisher.estimate_eigenvector
    if transposed:
        fisher.estimate_eigenvector = lambda covariances: {
            name: (q_a.T, q_s.T) for name, (q_a, q_s) in plain(covariances).items()}

    def loss(params, data):
        x, y = data
        return torch.nn.functional.cross_entropy(functional_call(model, params, (x,)), y)

    data = lambda part: DataLoader(TensorDataset(x[part], y[part]), batch_size=8)
    torch.set_default_dtype(torch.float64)
    try:
        side = attributor(model, ["0", "2"], loss)
        side.cache(data(slice(4, None)))
        result = side.attribute(data(slice(4, None)), data(slice(4))).T
    finally:
        torch.set_default_dtype(torch.float32)
        fisher.estimate_eigenvector = plain
    read = []
    for a, target in zip(x, y):
        hidden = model[0](a)
        s = model[2](hidden.tanh())
        d0, d2 = torch.autograd.grad(torch.nn.functional.cross_entropy(s, target), [hidden, s])
        one = torch.ones(1 if bias else 0).double()
        read.append({"0": (torch.cat([a, one])[None], d0[None]),
                     "2": (torch.cat([hidden.tanh().detach(), one])[None], d2[None])})
    return difference(result.detach(), scores(read[:4], read[4:], damping=DAMPING))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(Dattri)
    else:
        for bias in (False, True):
            for transposed in (False, True):
                print(f"biases {bias}, eigenvectors transposed {transposed}: {classifier(bias, transposed):.1e}")
