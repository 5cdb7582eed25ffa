# SPDX-License-Identifier: Apache-2.0
"""`TrainConfig`: every choice of a training run, with its unit and default, readable from TOML or JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from .. import _fields
from .files import read_settings
from .forms import ARCHITECTURES, FORMS, PENALTIES, UNBOUNDED, check_form, form_defaults, widths_of
from .optimiser import MOMENTS, check_optimiser
from .presets import fields_of


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The choices of a training run. Checked on construction; `resolve` fills in what is left to the data."""

    m: int = dataclasses.field(metadata={"help": "latents (dictionary size)"})
    k: int = _field(
        32,
        "latents active per token: exactly, on average (batch_topk, matryoshka), or aimed at (jumprelu with a squared "
        "penalty); no more than a number to relu, gated and other penalties",
    )
    form: str = _field("topk", f"how latents are chosen and trained: {', '.join(map(repr, FORMS))}")
    architecture: str = _field(
        "autoencoder",
        "'autoencoder'; 'transcoder' or 'skip_transcoder' from the first part of a row to the second; 'crosscoder' of "
        "all parts of a row; 'cross_layer' from the parts of the first half (a layer's input each) to those of the "
        "second half (the layers' targets), with m and k of each layer",
    )
    sites: str | None = _field(
        None, "widths of the parts of a row, as '576,576'; default: of the sites that the activations were taken from"
    )
    d: int | None = _field(None, "width of the activations; default: that of the data")
    k_start: int | None = _field(
        None, "latents active per token at the first step, falling linearly to k; default: k from the start"
    )
    k_anneal_steps: int | None = _field(
        None, "steps over which k falls, where k_start is given; default: 10 % of all steps"
    )
    batch_size: int = _field(4096, "tokens per step")
    epochs: int = _field(1, "passes over the data; not used where `tokens` is given")
    tokens: int | None = _field(None, "tokens to train on, over as many passes as that takes; default: epochs x rows")
    lr: float | None = _field(
        None,
        "peak learning rate; default: 2e-4 / sqrt(m / 2**14), a rule for runs of many thousand steps: a run of some "
        "hundred steps wants 3 to 10 times that",
    )
    warmup_steps: int | None = _field(None, "steps of linear warm-up; default: 5 % of all steps, at most 1000")
    warmup_from_zero: bool = _field(False, "the first step of the warm-up has learning rate 0, not its first share")
    decay: float = _field(0.2, "share of the steps, at the end, over which the learning rate falls linearly to 0")
    beta1: float = _field(0.9, "Adam's decay rate of the mean gradient")
    beta2: float = _field(0.999, "Adam's decay rate of the mean squared gradient")
    eps: float = _field(1e-8, "Adam's term in the denominator")
    normalise_loss: bool = _field(
        True,
        "divide the squared error by the variance of the data, which scale_input has made 1 already",
    )
    clip_norm: float | None = _field(None, "largest joint norm of all gradients; default: no clipping")
    optimizer: str = _field(
        "dense",
        "'dense': Adam, exactly; 'lazy': the same at the cost of the latents that fired, for beta1 = 0; 'masked': a "
        "step changes only latents that fired in it (as SparseAdam)",
    )
    moments: str = _field(
        "float32",
        "Adam's moments of encoder and decoder: 'float32', 'bfloat16' or '8bit', the latter two rounded stochastically",
    )
    weights: str = _field(
        "float32",
        "encoder and decoder, with dtype 'bfloat16': 'float32', 'bfloat16' (rounded stochastically) or "
        "'bfloat16_master' (with a float32 copy in which the steps add up)",
    )
    unit_decoder: bool = _field(
        True, "keep decoder rows at unit norm (gradient projected, rows renormalised each step)"
    )
    decoder_scale: float = _field(
        1.0,
        "length of the decoder rows at the start; 0 for transcoders, whose outputs are no sums of their inputs' "
        "directions (wants unit_decoder = false)",
    )
    select_by_norm: bool = _field(False, "select latents by activation times decoder norm (for unit_decoder = false)")
    k_aux: int | None = _field(
        None, "dead latents in the AuxK term; 0: no such term; default: half the width of the output, at most m"
    )
    aux_coefficient: float = _field(1 / 32, "weight of the AuxK term")
    multi_topk: float = _field(
        0.0, "weight of a second reconstruction from the best 4k latents (form topk); 1/8 is usual"
    )
    sparsity: float | None = _field(
        None, "weight of the sparsity term (forms relu, jumprelu, gated); default: that of the form's publication"
    )
    sparsity_warmup: float = _field(0.1, "share of the steps, at the start, over which that weight rises from 0")
    penalty: str = _field(
        "l0", f"sparsity term of form jumprelu: {', '.join(map(repr, PENALTIES))}; the squared ones aim at an L0 of k"
    )
    bandwidth: float | None = _field(
        None,
        "form jumprelu: width of the window that trains a threshold, scaled activations; default: 0.001, or 2 / sqrt(d)"
        " with penalty 'tanh'",
    )
    straight_through: bool = _field(False, "form jumprelu: the window's gradient reaches the encoder as well")
    threshold_init: float | None = _field(
        None,
        "form jumprelu: initial threshold, scaled activations; default: 0.001, or 0.1 / sqrt(d) with penalty 'tanh'",
    )
    preact_coefficient: float | None = _field(
        None,
        "form jumprelu: weight of the term that revives dead latents; default: 0, or 3e-6 / sqrt(d) with 'tanh'",
    )
    threshold_decay: float = _field(
        0.999, "decay rate of the running mean that gives forms batch_topk and matryoshka their threshold in use"
    )
    joint: bool = _field(
        True,
        "form batch_topk of architecture 'cross_layer': the largest activations of all layers together, k of each "
        "layer on average; false: of every layer by itself",
    )
    prefixes: str | None = _field(
        None,
        "widths of the nested dictionaries of form matryoshka, as '512,2048'; default: 1/32, 3/32, 7/32 and 15/32 of m,"
        " and m",
    )
    dead_window: int | None = _field(
        None, "tokens without firing after which a latent is dead; default: 1/40 of all tokens, at most 10,000,000"
    )
    ema: float = _field(
        0.0,
        "decay rate of an average of the weights over the steps, which the saved coder then has; 0: the last weights; "
        "0.999 averages over some thousand steps (forms batch_topk and matryoshka: with a threshold of their own)",
    )
    centre_input: bool | None = _field(
        None,
        "train on data less their mean row; undone in the saved coder; default: where no b_dec is subtracted from the "
        "input (all architectures but 'autoencoder'), as latents die by the thousand far from the origin",
    )
    scale_input: bool = _field(
        True, "train on data scaled so that their mean squared distance from the mean is 1; undone in the saved coder"
    )
    b_dec_init: str = _field("geometric_median", "centre that b_dec starts at: 'geometric_median', 'mean' or 'zero'")
    nonfinite: str = _field(
        "stop", "rows with NaN or infinite values: 'stop' the run, or 'drop' them; they are counted in metrics.jsonl"
    )
    prefetch: int = _field(2, "batches made ready by a thread while a step runs; 0: no thread")
    init_rows: int = _field(32768, "rows, at most, from which centre and scale of the data are measured")
    dtype: str = _field(
        "float32", "'float32', 'float64', or 'bfloat16': computed in bfloat16, parameters and moments in float32"
    )
    device: str = _field("auto", "'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ...")
    shard_latents: int | None = _field(
        None,
        "under torchrun: processes that share the latents among them; as many times that encode other rows of a batch "
        "each; default: all of them",
    )
    rank_timeout: float = _field(600.0, "under torchrun: seconds to wait for another process before the run ends")
    seed: int = _field(0, "of the initial weights")
    data_seed: int | None = _field(None, "of the order of the data; default: seed")
    shuffle_rows: int | None = _field(
        None, "rows on disk that are mixed at a time; default: all of them up to 8 GiB, else 1,048,576"
    )
    log_every: int = _field(10, "steps between two lines of metrics.jsonl")
    tensorboard: bool = _field(False, "write metrics as TensorBoard events too, into the folder tensorboard of the run")
    checkpoint_every: int = _field(1000, "steps between two checkpoints; 0: only when the run is interrupted")

    def __post_init__(self) -> None:
        _fields.whole("m", self.m, 1, 2**31 - 1)
        _fields.whole("k", self.k, 1, self.m, "m")
        for name in ("batch_size", "epochs", "init_rows", "log_every"):
            _fields.whole(name, getattr(self, name), 1)
        for name in ("d", "tokens", "dead_window", "shuffle_rows", "shard_latents"):
            if getattr(self, name) is not None:
                _fields.whole(name, getattr(self, name), 1)
        if self.k_start is not None:
            _fields.whole("k_start", self.k_start, self.k, self.m, "m")
        if self.k_anneal_steps is not None:
            _fields.whole("k_anneal_steps", self.k_anneal_steps)
            if self.k_start is None:
                raise ValueError(
                    f"k_anneal_steps is {self.k_anneal_steps}, but k_start is not given: it falls from there"
                )
        for name in ("seed", "checkpoint_every", "prefetch"):
            _fields.whole(name, getattr(self, name))
        if self.data_seed is not None:
            _fields.whole("data_seed", self.data_seed)
        if self.warmup_steps is not None:
            _fields.whole("warmup_steps", self.warmup_steps)
        if self.k_aux is not None:
            _fields.whole("k_aux", self.k_aux, 0, self.m, "m")
        for name in ("lr", "clip_norm", "bandwidth", "rank_timeout"):
            if getattr(self, name) is not None:
                _fields.number(name, getattr(self, name), above=True)
        for name in (
            "eps", "aux_coefficient", "multi_topk", "sparsity", "threshold_init", "preact_coefficient", "decoder_scale"
        ):  # fmt: skip
            if getattr(self, name) is not None:
                _fields.number(name, getattr(self, name))
        for name in ("beta1", "beta2", "ema", "threshold_decay"):
            _fields.number(name, getattr(self, name), 0.0, 1.0)
        for name in ("decay", "sparsity_warmup"):
            if _fields.number(name, getattr(self, name)) > 1:
                raise ValueError(f"{name} must be between 0 and 1, a share of the steps, got {getattr(self, name)}")
        for name in (
            "warmup_from_zero", "normalise_loss", "straight_through", "unit_decoder", "select_by_norm", "scale_input",
            "joint", "tensorboard",
        ):  # fmt: skip
            _fields.flag(name, getattr(self, name))
        if self.centre_input is not None:
            _fields.flag("centre_input", self.centre_input)
        _fields.choice("form", self.form, tuple(FORMS))
        _fields.choice("architecture", self.architecture, ARCHITECTURES)
        _fields.choice("penalty", self.penalty, PENALTIES)
        _fields.choice("optimizer", self.optimizer, ("dense", "lazy", "masked"))
        _fields.choice("moments", self.moments, tuple(MOMENTS))
        _fields.choice("weights", self.weights, ("float32", "bfloat16", "bfloat16_master"))
        _fields.choice("nonfinite", self.nonfinite, ("stop", "drop"))
        _fields.choice("b_dec_init", self.b_dec_init, ("geometric_median", "mean", "zero"))
        _fields.choice("dtype", self.dtype, ("float32", "float64", "bfloat16"))
        if not isinstance(self.device, str):
            raise TypeError(f"device must be a string, got {type(self.device).__name__}")
        check_form(self)
        check_optimiser(self)

    def resolve(self, d: int, tokens_per_epoch: int | None, sites: tuple[int, ...] | None = None) -> TrainConfig:
        """The same choices with every default that depends on the data filled in.

        Args:
            d: width of the data.
            tokens_per_epoch: tokens in the whole batches of one pass, or None if the data cannot tell.
            sites: widths of the parts of a row, where the data can tell.

        Raises:
            ValueError: `d` is not that of the data; fewer tokens than one batch; no `tokens`, and data without length.
        """
        if self.d is not None and self.d != d:
            raise ValueError(f"d must be the width of the data, {d}, got {self.d}")
        tokens = self.tokens
        if tokens is None:
            if tokens_per_epoch is None:
                raise ValueError("tokens must be given: the data cannot tell how many rows they have")
            tokens = self.epochs * tokens_per_epoch
        steps = tokens // self.batch_size
        if steps < 1:
            raise ValueError(f"tokens must be at least batch_size = {self.batch_size}, got {tokens}")
        tokens = steps * self.batch_size
        parts = widths_of("sites", self.sites) or sites or (d,)
        if sum(parts) != d:
            raise ValueError(f"sites must add up to the width of the data, {d}, got {self.sites}")
        if self.architecture == "cross_layer":
            half = len(parts) // 2
            if len(parts) % 2 or len({*parts[:half]}) > 1 or len({*parts[half:]}) > 1:
                raise ValueError(
                    "sites must be the widths of the inputs of all layers of a cross-layer transcoder, all the same, "
                    f"and then of their targets, all the same, got {list(parts)}; take the activations at those sites"
                )
        if self.is_transcoder and self.architecture != "cross_layer" and len(parts) != 2:
            raise ValueError(
                f"sites must be the widths of input and target of a {self.architecture}, got {list(parts)}; take the "
                "activations at two sites, or give the widths"
            )
        if self.architecture == "crosscoder" and len(parts) < 2:
            raise ValueError(f"sites must name the parts of a crosscoder's row, two or more, got {list(parts)}")
        out = parts[-1] if self.is_transcoder else d
        default = {
            "d": d,
            "sites": ",".join(map(str, parts)),
            "tokens": tokens,
            "data_seed": self.seed,
            "centre_input": self.architecture != "autoencoder",
            "lr": 2e-4 / math.sqrt(self.m / 2**14),
            "warmup_steps": min(1000, steps // 20),
            "k_aux": 0 if FORMS[self.form].select in UNBOUNDED else min(max(1, out // 2), self.m),
            "dead_window": min(10_000_000, max(1, tokens // 40)),
        }
        default |= form_defaults(self, out)
        if self.k_start is not None:
            default["k_anneal_steps"] = steps // 10
            if (self.k_anneal_steps or 0) >= steps:
                raise ValueError(
                    f"k_anneal_steps must be less than the {steps} steps of the run, got {self.k_anneal_steps}: "
                    "k would not be reached"
                )
        missing = {name: value for name, value in default.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **{**missing, "tokens": tokens})

    @property
    def is_transcoder(self) -> bool:
        """Whether the first half of the parts of a row is the input and the second half the target."""
        return self.architecture in ("transcoder", "skip_transcoder", "cross_layer")

    @property
    def layers(self) -> int:
        """Layers that have m latents each, of a resolved configuration."""
        return len(self.parts) // 2 if self.architecture == "cross_layer" else 1

    @property
    def input_width(self) -> int:
        """Of the part of a row that is encoded, of a resolved configuration."""
        return sum(self.parts[: len(self.parts) // 2]) if self.is_transcoder else self.d

    @property
    def parts(self) -> tuple[int, ...]:
        """Widths of the parts of a row that have a scale of their own, of a resolved configuration."""
        return (self.d,) if self.architecture == "autoencoder" else widths_of("sites", self.sites)

    @property
    def steps(self) -> int:
        """Steps of a resolved configuration."""
        if self.tokens is None:
            raise ValueError("steps are known once resolve(d, tokens_per_epoch) has been called")
        return self.tokens // self.batch_size

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (from 1), of a resolved configuration: warm-up, plateau, linear decay."""
        rise = (step - self.warmup_from_zero) / self.warmup_steps if self.warmup_steps else 1.0
        decay_steps = self.decay * self.steps
        fall = (self.steps - step + 1) / decay_steps if decay_steps >= 1 else 1.0
        return self.lr * min(1.0, rise, fall)

    def k_at(self, step: int) -> int:
        """Latents active per token in a step (from 1), of a resolved configuration."""
        if self.k_start is None or step > self.k_anneal_steps:
            return self.k
        return self.k_start + round((self.k - self.k_start) * (step - 1) / self.k_anneal_steps)

    def ramp_at(self, step: int) -> float:
        """Share of the sparsity weight in force in a step (from 1), of a resolved configuration."""
        rising = self.sparsity_warmup * self.steps
        return min(1.0, step / rising) if rising >= 1 else 1.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """From plain values; an unknown field is an error. The values of ``preset``, if one is named, serve where
        nothing else is given."""
        values = expanded(values)
        if "m" not in values:
            raise ValueError("a training configuration needs m, the number of latents")
        return cls(**values)

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """From a ``.toml`` or ``.json`` file. Errors name the file and the field."""
        values = read_settings(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error

    def write(self, path: str | Path) -> Path:
        """As TOML with every field explained; a field left to its data-dependent default is commented out."""
        path = Path(path)
        path.write_text(self.to_toml(), encoding="utf-8")
        return path

    def to_toml(self) -> str:
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lines.append(f"# {field.metadata['help']}")
            lines.append(f"# {field.name} =" if value is None else f"{field.name} = {json.dumps(value)}")
        return "\n".join(lines) + "\n"


_FLOATS = {f.name for f in dataclasses.fields(TrainConfig) if "float" in f.type}

TrainConfig.__doc__ += "\n\n    Attributes:\n" + "\n".join(
    f"        {f.name}: {f.metadata['help']}."
    + ("" if f.default in (None, dataclasses.MISSING) else f" Default: {f.default!r}.")
    for f in dataclasses.fields(TrainConfig)
)


def expanded(values: dict[str, Any]) -> dict[str, Any]:
    """Fields as a file or a command gives them, with those of their ``preset`` where they give nothing else.

    Raises `ValueError` for an unknown field or preset.
    """
    _fields.known("a training configuration", values, ["preset", *(f.name for f in dataclasses.fields(TrainConfig))])
    values = {name: _as_written(name, value) for name, value in values.items()}
    preset = values.pop("preset", None)
    return values if preset is None else {**fields_of(preset), **values}


def _as_written(name: str, value: Any) -> Any:
    """``lr = 1`` in a file is a whole number there and a float here; widths may be a list there."""
    if name in ("sites", "prefixes") and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return float(value) if name in _FLOATS and isinstance(value, int) and not isinstance(value, bool) else value
