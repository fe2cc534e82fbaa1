"""EK-FAC scores by their definition, dense and in float64, without helpers: what the sides of peers.py are held to.

Every example runs alone, so there are no pads. (Λ + λ) is turned into one [d_out d_in]² matrix for each layer and
solved. `squares`, `positions` and `labels` are the places where libraries differ from the definition.
"""

import torch


def gradients(model, layers, ids, labels="true"):
    """{layer: (ā [T, d_in (+1)], Ds [T, d_out])} of the loss of one sequence, summed over its targets.

    labels: "true", or "sqrt_p" for Σ_v √p_v log p_v (p fixed) at every position, which is what pyDVL differentiates.
    """
    taken, handles = {}, []
    for name in layers:
        hook = lambda module, inputs, output, name=name: taken.__setitem__(name, (module, inputs[0], output))
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    logp = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    loss = -logp.gather(1, ids[1:, None]).sum() if labels == "true" else (logp.exp().detach().sqrt() * logp).sum()
    grads = torch.autograd.grad(loss, [taken[name][2] for name in layers])
    read = {}
    for name, ds in zip(layers, grads):
        module, a, _ = taken[name]
        a = a[0].detach().double()
        read[name] = (a if module.bias is None else torch.cat([a, torch.ones_like(a[:, :1])], 1), ds[0].double())
    return read


def scores(query, train, fit=None, damping=None, squares="sequence", positions="real", method="ek-fac"):
    """[query, train] of lists of what `gradients` gives; fit: the training gradients that the factors are made of.

    damping: None is 0.1 × mean(Λ) of each layer. squares: "sequence" is the definition, "token" squares before the sum
    over tokens. positions: "targets" leaves the last position, which predicts nothing, out of A. method "k-fac" takes
    Λ from the eigenvalues, in the same units.
    """
    fit, total = fit or train, 0
    whole = lambda pair: torch.einsum("to,ti->oi", pair[1], pair[0])
    for name in query[0]:
        inputs, outputs = (torch.cat([example[name][side] for example in fit]) for side in (0, 1))
        if positions == "targets":
            inputs = torch.cat([example[name][0][:-1] for example in fit])
        L_A, Q_A = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
        L_S, Q_S = torch.linalg.eigh(outputs.T @ outputs / len(inputs))
        Q = torch.kron(Q_S, Q_A)  # rows as torch flattens [out, in]
        if squares == "sequence":
            rotated = [(whole(example[name]).flatten() @ Q).square() for example in fit]
        else:
            rotated = [(torch.einsum("to,ti->toi", example[name][1], example[name][0]).flatten(1) @ Q).square().sum(0)
                       for example in fit]
        Lambda = torch.stack(rotated).mean(0)
        if method == "k-fac":
            Lambda = torch.kron(L_S, L_A) * len(inputs) / len(fit)
        damped = Lambda + (0.1 * Lambda.mean() if damping is None else damping)
        q, m = (torch.stack([whole(example[name]).flatten() for example in side]) for side in (query, train))
        total = total + torch.linalg.solve(Q @ damped.diag() @ Q.T, q.T).T @ m.T
    return total


def difference(ours, theirs):
    """The largest ‖Δ‖/‖theirs‖ of a query."""
    ours, theirs = ours.flatten(1), theirs.flatten(1)
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())
