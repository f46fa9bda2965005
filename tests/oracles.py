"""Right answers, slow and obvious; nothing here shares code with the package.

A derivative is what `backward()` would leave in `.grad`, for one output of one example
at a time with the whole batch in one forward pass: this is how a network is trained.
"""

import copy

import torch

TOLERANCE = 1e-10  # float64, sums of some hundred terms: round-off is near 1e-14


def call(model, x):
    """`model(x)`; a tuple is the arguments, a dict the keywords."""
    if isinstance(x, dict):
        return model(**x)
    if isinstance(x, tuple):
        return model(*x)
    return model(x)


def each(function, x):
    """`function` of every tensor of a batch (a tensor, a flat tuple or dict)."""
    if isinstance(x, dict):
        return {key: function(value) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(function(value) for value in x)
    return function(x)


def gradients(number, tensors):
    """d number / d tensor for each of the tensors; zero where there is no path."""
    for tensor in tensors:
        tensor.grad = None
    if number.requires_grad:
        number.backward(retain_graph=True)
    return [
        torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.to_dense()
        for tensor in tensors
    ]


def jacobian_by_loop(model, x, output_fn=call, names=None):
    """∂f/∂θ as {name: (n, c, *shape)}; by default of what has `requires_grad`."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    if names is None:
        names = [name for name, p in parameters.items() if p.requires_grad]
    outputs = output_fn(model, each(torch.clone, x))
    outputs = outputs.reshape(outputs.shape[0], -1)
    rows = {name: [] for name in names}
    for example in outputs:
        for number in example:
            wanted = [parameters[name] for name in names]
            for name, gradient in zip(names, gradients(number, wanted), strict=True):
                rows[name].append(gradient)
    return {
        name: torch.stack(found).view(*outputs.shape, *parameters[name].shape)
        for name, found in rows.items()
    }


def ntk_by_loop(model, x1, x2=None, output_fn=call, names=None, scaling=None):
    """Θ[i, j, k, l] = Σ_p Λ_p ∂f_k(x1_i)/∂θ_p · ∂f_l(x2_j)/∂θ_p, entry by entry."""
    left = jacobian_by_loop(model, x1, output_fn, names)
    right = left if x2 is None else jacobian_by_loop(model, x2, output_fn, names)
    first, second = next(iter(left.values())), next(iter(right.values()))
    (n1, c), n2 = first.shape[:2], second.shape[0]
    kernel = first.new_zeros(n1, n2, c, c)
    for name in left:
        weight = 1.0 if scaling is None else scaling[name]
        for i in range(n1):
            for j in range(n2):
                for k in range(c):
                    for m in range(c):
                        term = weight * left[name][i, k] * right[name][j, m]
                        kernel[i, j, k, m] += term.sum()
    return kernel


def jacobian_by_differences(model, x, name, step=1e-6):
    """∂f/∂(one parameter) by central differences, `(n, c, p)`."""
    model = copy.deepcopy(model)
    weight = dict(model.named_parameters())[name].data.view(-1)
    columns = []
    for index in range(len(weight)):
        value = weight[index].item()
        outputs = []
        for shifted in (value + step, value - step):
            weight[index] = shifted
            outputs.append(call(model, x).detach().flatten(1))
        weight[index] = value
        columns.append((outputs[0] - outputs[1]) / (2 * step))
    return torch.stack(columns, -1)


def input_jacobian_by_loop(model, x, output_fn=call):
    """∂f_k(x_i)/∂x_i for a batch that is run jointly, `(n, c, d)`."""
    model = copy.deepcopy(model)
    sources = []

    def source(tensor):
        if tensor.is_floating_point():
            tensor = tensor.clone().requires_grad_()
            sources.append(tensor)
        return tensor.clone()  # the model may overwrite what it is given

    outputs = output_fn(model, each(source, x))
    outputs = outputs.reshape(outputs.shape[0], -1)
    examples = []
    for i, example in enumerate(outputs):
        rows = [
            torch.cat([g[i].flatten() for g in gradients(number, sources)])
            for number in example
        ]
        examples.append(torch.stack(rows))
    return torch.stack(examples)


def relative_error(value, expected):
    """‖value − expected‖_F / ‖expected‖_F."""
    assert value.shape == expected.shape
    return ((value - expected).norm() / expected.norm()).item()
