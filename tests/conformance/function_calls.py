"""A module that calls, once each, the functions that models use and none of the catalogue happens to use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNARY = (
    "abs", "acos", "angle", "asin", "atan", "bitwise_not", "ceil", "conj", "cos", "cosh", "deg2rad", "detach", "erf",
    "erfc", "exp", "exp2", "expm1", "floor", "frac", "isfinite", "isinf", "isnan", "log", "log10", "log1p", "log2",
    "logical_not", "logit", "nan_to_num", "neg", "positive", "rad2deg", "ravel", "reciprocal", "relu", "round",
    "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "square", "squeeze", "tan", "tanh", "trunc", "clone",
)  # fmt: skip
BINARY = (
    "add", "atan2", "div", "eq", "floor_divide", "fmod", "ge", "gt", "le", "logical_and", "logical_or", "logical_xor",
    "lt", "maximum", "minimum", "mul", "ne", "pow", "remainder", "sub",
)  # fmt: skip
REDUCTIONS = (
    "all", "amax", "amin", "any", "argmax", "argmin", "argsort", "max", "mean", "median", "min", "prod", "sort",
    "std", "sum", "var",
)  # fmt: skip
IN_PLACE = (
    "abs_", "exp_", "neg_", "relu_", "sigmoid_", "sqrt_", "square_", "tanh_", "zero_", "logical_not_",
)  # fmt: skip
OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow",
)  # fmt: skip
BITS = (
    "and", "or", "xor",
)  # fmt: skip
ACTIVATIONS = (
    "celu", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
    "mish", "relu", "relu6", "selu", "silu", "softplus", "softshrink", "softsign", "tanhshrink",
)  # fmt: skip
DROPOUTS = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
)  # fmt: skip


class FunctionCalls(nn.Module):
    """Makes the calls; what it returns is of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))
        self.flag = nn.Parameter(torch.ones(4, dtype=torch.bool), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Call everything with a batch of 4 x 4 tables."""
        self.pointwise(x)
        self.reductions(x)
        self.products(x)
        self.shapes(x)
        self.places(x, torch.arange(4, device=x.device))
        self.made(x)
        self.layers(x)
        self.images(x.unsqueeze(1))
        self.spectra(x)
        return x

    def pointwise(self, x: Tensor) -> None:
        whole = x.long()
        for name in UNARY:
            value = whole if name == "bitwise_not" else x
            getattr(value, name)()
            getattr(torch, name)(value)
        for name in BINARY:
            getattr(x, name)(x)
            getattr(torch, name)(x, x)
        for name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
            getattr(whole, name)(whole)
            getattr(torch, name)(whole, whole)
        for name in IN_PLACE:
            getattr(x.clone(), name)()
        for name in OPERATORS:
            getattr(x, f"__{name}__")(2.0)
            getattr(x, f"__r{name}__")(2.0)
        for name in ("add", "sub", "mul", "truediv"):
            getattr(x.clone(), f"__i{name}__")(2.0)
        for name in BITS:
            getattr(whole, f"__{name}__")(whole)
            getattr(whole, f"__r{name}__")(1)
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            getattr(x, f"__{name}__")(x)
        x.clone().add_(x).sub_(x).mul_(x).div_(x).clamp_(0.0, 1.0).fill_(1.0).copy_(x)
        x.clamp(0.0), x.clip(0.0, 1.0), x.clamp_min(0.0), x.clamp_max(1.0), x.lerp(x, 0.5), x.isnan().__invert__()
        torch.clamp(x, min=0.0), torch.clip(x, 0.0), torch.clamp_min(x, 0.0), torch.clamp_max(x, 1.0)
        torch.lerp(x, x, 0.5), torch.rsub(x, 1.0), torch.special.expit(x)
        for name in ("addcmul", "addcdiv"):
            getattr(x, name)(x, x, value=0.5)
            getattr(torch, name)(x, x, x)
        for name in ("masked_fill", "masked_fill_"):
            getattr(x.clone(), name)(self.flag, 0.0)
        torch.masked_fill(x, self.flag, 0.0), torch.where(self.flag, x, 0.0), x.where(self.flag, x)
        for name in ("float", "double", "half", "bfloat16", "int", "long", "bool", "cfloat"):
            getattr(x, name)()
        x.to(torch.float64), x.type(torch.float64), x.type_as(x), x.contiguous()

    def reductions(self, x: Tensor) -> None:
        for name in REDUCTIONS:
            getattr(x, name)(dim=-1)
            getattr(torch, name)(x, dim=-1)
        for name in ("cumsum", "cumprod", "softmax", "log_softmax", "logsumexp"):
            getattr(x, name)(dim=-1)
            getattr(torch, name)(x, dim=-1)
        torch.var_mean(x, -1), torch.std_mean(x, -1), x.norm(dim=-1), torch.norm(x, dim=-1)
        torch.linalg.vector_norm(x, dim=-1), torch.linalg.norm(x, dim=-1)
        x.topk(2, -1), torch.topk(x, 2), x.diff(), torch.diff(x)
        F.softmax(x, -1), F.log_softmax(x, -1), F.softmin(x, -1), F.normalize(x), F.cosine_similarity(x, x)

    def products(self, x: Tensor) -> None:
        w, v = self.weight, self.weight[0]
        x.matmul(w), torch.matmul(x, w), x.__matmul__(w), w.__rmatmul__(x), x.bmm(x), torch.bmm(x, x)
        w.mm(w), w.mv(v), torch.mv(w, v), w.addmm(w, w), torch.addmm(w, w, w), v.outer(v), torch.outer(v, v)
        x.baddbmm(x, x), torch.baddbmm(x, x, x), torch.einsum("bij,jk->bik", x, w), torch.tensordot(x, w, 1)
        torch.cdist(x, x), F.linear(x, w, v), F.bilinear(x, x, w.unsqueeze(0).expand(2, 4, 4))
        F.scaled_dot_product_attention(x, x, x)

    def shapes(self, x: Tensor) -> None:
        x.view(-1, 4), x.reshape(-1, 4), torch.reshape(x, (-1, 4)), x.view_as(x), x.reshape_as(x), x.expand_as(x)
        x.expand(2, -1, 4, 4) if x.ndim == 4 else x.unsqueeze(1).expand(-1, 2, 4, 4)
        x.repeat(1, 2, 1), x.tile(1, 2), torch.tile(x, (2, 1)), x.broadcast_to(x.shape), torch.broadcast_to(x, x.shape)
        x.repeat_interleave(2, 1), torch.repeat_interleave(x, 2, 1), x.permute(0, 2, 1), torch.permute(x, (0, 2, 1))
        for name in ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"):
            getattr(x, name)(1, 2)
            getattr(torch, name)(x, 1, 2)
        self.weight.t(), torch.t(self.weight), self.weight.T, x.mT, x.data, x.flatten(1), torch.flatten(x, 1)
        x.unflatten(2, (2, 2)), torch.unflatten(x, 2, (2, 2)), x.unsqueeze(1), torch.unsqueeze(x, 1)
        x.squeeze(1), x.chunk(2, 1), torch.chunk(x, 2, 1), x.split(2, 1), torch.split(x, 2, 1)
        x.split_with_sizes([1, 3], 1), torch.split_with_sizes(x, [1, 3], 1), x.unbind(1), torch.unbind(x, 1)
        (
            x.tensor_split(2, 1),
            torch.tensor_split(x, 2, 1),
            x.flip(1),
            torch.flip(x, (1,)),
            x.roll(1, 1),
            torch.roll(x, 1, 1),
        )
        x.unfold(1, 2, 1), x.diagonal(0, 1, 2), torch.diagonal(x, 0, 1, 2)
        x.tril(), x.triu(), torch.tril(x), torch.triu(x)
        torch.cat([x, x], 1), torch.concat([x, x], 1), torch.concatenate([x, x], 1), torch.stack([x, x], 1)
        torch.hstack([x, x]), torch.vstack([x, x]), torch.dstack([x, x]), torch.column_stack([x, x])
        torch.broadcast_tensors(x, x), torch.meshgrid(self.weight[0], self.weight[1], indexing="ij")

    def places(self, x: Tensor, index: Tensor) -> None:
        where = index.reshape(1, 4, 1).expand(x.shape)
        x[:, 1:], x[..., None], x[:, index], x.clone().__setitem__((slice(None), 0), 0.0)
        x.select(1, 0), torch.select(x, 1, 0), x.narrow(1, 0, 2), torch.narrow(x, 1, 0, 2)
        x.index_select(1, index), torch.index_select(x, 1, index), x.gather(1, where), torch.gather(x, 1, where)
        x.take_along_dim(where, 1), torch.take_along_dim(x, where, 1)
        for name in ("scatter", "scatter_", "scatter_add", "scatter_add_"):
            getattr(x.clone(), name)(1, where, x)
        for name in ("index_add", "index_add_"):
            getattr(x.clone(), name)(1, index, x)
        torch.scatter(x, 1, where, x), torch.scatter_add(x, 1, where, x), torch.index_add(x, 1, index, x)
        x.index_fill(1, index, 0.0), torch.index_fill(x, 1, index, 0.0)
        F.embedding(index, self.weight), F.one_hot(index, 4)

    def made(self, x: Tensor) -> None:
        x.new_zeros(2, 4), x.new_ones(2, 4), x.new_full((2, 4), 1.0), x.new_tensor([1.0, 2.0])
        torch.zeros(2, 4), torch.ones(2, 4), torch.full((2, 4), 1.0), torch.tensor([1.0, 2.0])
        torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 1.0), torch.eye(4)
        torch.arange(4), torch.linspace(0, 1, 4), torch.tril_indices(4, 4), torch.triu_indices(4, 4)

    def layers(self, x: Tensor) -> None:
        w, v = self.weight, self.weight[0]
        for name in ACTIVATIONS:
            getattr(F, name)(x)
        for name in DROPOUTS:
            getattr(F, name)(x.unsqueeze(-1).unsqueeze(-1) if name == "dropout3d" else x, 0.1, False)
        torch.dropout(x, 0.1, False), torch.feature_dropout(x, 0.1, False), torch.alpha_dropout(x, 0.1, False)
        F.prelu(x, v), F.threshold(x, 0.1, 0.0), x.prelu(v)
        F.layer_norm(x, (4,)), torch.layer_norm(x, (4,)), F.rms_norm(x, (4,)), torch.rms_norm(x, (4,))
        F.batch_norm(x, v.detach(), v.detach()), F.instance_norm(x), F.group_norm(x, 2), F.local_response_norm(x, 2)
        F.conv1d(x, w.unsqueeze(-1)), F.conv_transpose1d(x, w.unsqueeze(-1))
        F.max_pool1d(x, 2), F.avg_pool1d(x, 2), F.lp_pool1d(x, 2.0, 2), F.adaptive_avg_pool1d(x, 2)
        F.adaptive_max_pool1d(x, 2), F.pad(x, (1, 1))
        state = x.new_zeros(1, x.shape[0], 4)
        for name in ("gru", "rnn_tanh", "rnn_relu"):
            gates = torch.cat([w] * (3 if name == "gru" else 1))
            getattr(torch, name)(x, state, [gates, gates], False, 1, 0.0, False, False, True)
        gates = torch.cat([w] * 4)
        torch.lstm(x, [state, state], [gates, gates], False, 1, 0.0, False, False, True)

    def images(self, x: Tensor) -> None:
        kernel, cube = self.weight.reshape(1, 1, 4, 4), x.unsqueeze(2)
        F.conv2d(x, kernel), F.conv_transpose2d(x, kernel), F.unfold(x, 2), F.fold(F.unfold(x, 2), (4, 4), 2)
        F.conv3d(cube, kernel.unsqueeze(2)), F.conv_transpose3d(cube, kernel.unsqueeze(2))
        F.avg_pool2d(x, 2), F.avg_pool3d(cube, (1, 2, 2)), F.max_pool3d(cube, (1, 2, 2)), F.lp_pool2d(x, 2.0, 2)
        F.adaptive_avg_pool2d(x, 2), F.adaptive_avg_pool3d(cube, 1)
        F.adaptive_max_pool2d(x, 2), F.adaptive_max_pool3d(cube, 1)
        values, indices = F.max_pool2d(x, 2, return_indices=True)
        F.max_unpool2d(values, indices, 2)
        F.interpolate(x, scale_factor=2.0), F.affine_grid(self.weight.reshape(-1)[:6].reshape(1, 2, 3), (1, 1, 4, 4))
        F.grid_sample(x, x.permute(0, 2, 3, 1).expand(-1, -1, -1, 2), align_corners=False)
        (
            F.pixel_shuffle(x.expand(-1, 4, -1, -1), 2),
            F.pixel_unshuffle(x, 2),
            F.channel_shuffle(x.expand(-1, 4, -1, -1), 2),
        )

    def spectra(self, x: Tensor) -> None:
        for name in (
            "rfft",
            "fft",
            "rfft2",
            "fft2",
            "rfftn",
            "fftn",
            "fftshift",
            "ifftshift",
            "ifft",
            "ifft2",
            "ifftn",
        ):
            getattr(torch.fft, name)(x)
        z = torch.fft.rfft2(x)
        torch.fft.irfft(z), torch.fft.irfft2(z), torch.fft.irfftn(z), z.real, z.imag, torch.real(z), torch.imag(z)
        torch.view_as_complex(torch.view_as_real(z)), torch.complex(x, x), torch.polar(x, x)
