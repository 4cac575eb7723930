"""Configures sparse layers: which layers have experts, and how tokens reach them."""

import dataclasses
from fractions import Fraction
from typing import Literal, get_args

from moe.config.checks import (
    ConfigError,
    as_computed,
    check_not_negative,
    check_positive,
    check_range,
    check_types,
    nearest_divisors,
)

GroupedKernel = Literal["blockwise", "tpu", "hopper"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Says which layers have experts, how a router chooses them, and how tokens reach them."""

    # The number of routed experts in a sparse layer. 0 makes every layer dense.
    num_experts: int = 0
    experts_per_token: int = 2  # the number of routed experts that process each token
    expert_dim: int = 352  # the hidden width of one expert
    # The number of experts that process every token without being chosen. They are computed as one
    # feed-forward network of num_shared_experts times the width.
    num_shared_experts: int = 0
    first_dense_layers: int = 0  # the number of dense layers before the first sparse one
    # The distance between sparse layers: after the first dense layers, the last of every
    # layer_period layers is sparse.
    layer_period: int = 1
    # How a router scores experts: "softmax" over all experts, or the "sigmoid" of each. "hash"
    # chooses by the token id alone. With "expert_choice" the experts choose their tokens.
    router: Literal["softmax", "sigmoid", "hash", "expert_choice"] = "softmax"
    # True divides the combine weights of a token by their sum. None does the same, except where
    # True is refused: with experts_per_token=1, where the quotient is always 1 and teaches the
    # router nothing, and with "expert_choice", whose weights stay probabilities.
    normalize_weights: bool | None = None
    weight_scale: float = 1.0  # a factor on all combine weights
    # The number of groups into which the experts are divided, in order. A token first chooses
    # groups_per_token groups and then experts within them.
    num_groups: int = 1
    groups_per_token: int = 1  # the number of groups that each token may choose experts from
    # In training, each number that enters the router is multiplied by a random factor between
    # 1 - jitter and 1 + jitter.
    jitter: float = 0.0
    # The factor of the balance loss in the objective. The loss is a mean over the sparse layers.
    balance_weight: float = 0.01
    # The tokens over which the balance loss compares load and probability: those of one row, or
    # those of a whole microbatch on all hosts.
    balance_scope: Literal["row", "batch"] = "batch"
    # The factor of the z-loss in the objective: the mean squared log-sum-exp of router logits.
    z_weight: float = 0.0
    # How far each step moves the bias of an expert whose load is not the mean. The biases steer
    # only the choice of experts. 0 leaves them out.
    bias_update_rate: float = 0.0
    # How the experts are computed: "dense" computes every expert for every token, "capacity" gives
    # each expert a fixed number of places, and "dropless" sorts the tokens by their experts.
    dispatch: Literal["dense", "capacity", "dropless"] = "dropless"
    # The program that computes the experts' matmuls under "dropless". "auto" takes the fastest one
    # for the mesh's chip, and docs/kernels.md says what each one can do.
    implementation: Literal["auto", GroupedKernel] = "auto"
    # The room of an expert under "capacity", as a multiple of its even share of a row's tokens.
    capacity_factor: float = 1.25
    # Which tokens stay where an expert is full: those at earlier positions, or those with higher
    # probabilities.
    priority: Literal["position", "probability"] = "position"
    # How tokens are exchanged between the devices of the mesh's expert axis.
    exchange: Literal["all_gather", "all_to_all", "ragged_all_to_all"] = "all_gather"
    # The room of a device in a ragged exchange, as a multiple of the mean number of rows.
    receive_factor: float = 2.0

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(
            self,
            "experts_per_token",
            "expert_dim",
            "layer_period",
            "weight_scale",
            "num_groups",
            "groups_per_token",
        )
        check_positive(self, "capacity_factor")
        check_not_negative(
            self,
            "num_experts",
            "num_shared_experts",
            "first_dense_layers",
            "balance_weight",
            "z_weight",
            "bias_update_rate",
        )
        check_range(self, 0.0, 0.5, "jitter")
        if not as_computed(self, "receive_factor") >= 1:
            raise ConfigError(
                f"receive_factor={self.receive_factor} has no room for an even load: "
                "set receive_factor to 1.0 or more"
            )
        if self.num_experts:
            self._check_counts()
            self._check_dispatch()
            self._check_router()

    @property
    def normalized(self) -> bool:
        """Returns whether combine weights are divided by their sum, also if the field is None."""
        if self.normalize_weights is not None:
            return self.normalize_weights
        return self.router == "hash" or (
            self.router != "expert_choice" and self.experts_per_token > 1
        )

    @property
    def row_share(self) -> Fraction:
        """Returns the part of a row's tokens that an expert has room for: capacity_factor A / E.

        The fraction is exact: the factor is taken as its decimals say, so that 1.2 is 6/5.
        """
        return Fraction(str(self.capacity_factor)) * self.experts_per_token / self.num_experts

    def _check_counts(self) -> None:
        """Raises ConfigError if a token would choose more experts or groups than there are."""
        chosen, groups = self.experts_per_token, self.groups_per_token
        if chosen > self.num_experts:
            raise ConfigError(
                f"experts_per_token={chosen} is more than num_experts={self.num_experts}: "
                f"set experts_per_token to at most {self.num_experts}"
            )
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}: "
                f"set num_groups to {nearest_divisors(self.num_experts, self.num_groups)}"
            )
        if groups > self.num_groups:
            raise ConfigError(
                f"groups_per_token={groups} is more than num_groups={self.num_groups}: "
                f"set groups_per_token to at most {self.num_groups}"
            )
        reach = groups * self.num_experts // self.num_groups
        if chosen > reach:
            raise ConfigError(
                f"experts_per_token={chosen} is more than the {reach} experts in "
                f"groups_per_token={groups} groups: set experts_per_token to at most {reach}"
            )

    def _check_dispatch(self) -> None:
        """Raises ConfigError if the dispatch cannot do what the exchange or the router needs."""
        for name, value, dispatches, reason in (
            (
                "exchange",
                "all_to_all",
                ("capacity",),
                "every device must send equally many rows",
            ),
            (
                "exchange",
                "ragged_all_to_all",
                ("dropless",),
                "rows are sent in the order of their experts",
            ),
            *(
                ("implementation", name, ("dropless",), "it computes rows sorted by their experts")
                for name in get_args(GroupedKernel)
            ),
            (
                "router",
                "expert_choice",
                ("dense", "capacity"),
                "each expert takes a fixed number of tokens",
            ),
        ):
            if getattr(self, name) == value and self.dispatch not in dispatches:
                options = " or ".join(repr(option) for option in dispatches)
                raise ConfigError(
                    f"{name}={value!r} does not work with dispatch={self.dispatch!r}, "
                    f"because {reason}: set dispatch to {options}"
                )

    def _check_router(self) -> None:
        """Raises ConfigError for an option that the router ignores or cannot learn with."""
        if self.router in ("hash", "expert_choice"):
            if self.bias_update_rate:
                raise ConfigError(
                    f"bias_update_rate={self.bias_update_rate} has no effect with "
                    f"router={self.router!r}: set bias_update_rate to 0.0"
                )
            if self.num_groups > 1:
                raise ConfigError(
                    f"num_groups={self.num_groups} has no effect with router={self.router!r}: "
                    "set num_groups to 1"
                )
        if self.normalize_weights and self.router == "expert_choice":
            raise ConfigError(
                "normalize_weights=True does not apply to router='expert_choice', whose weights "
                "are probabilities: set normalize_weights to False"
            )
        if self.normalize_weights and self.router != "hash" and self.experts_per_token == 1:
            raise ConfigError(
                "normalize_weights=True with experts_per_token=1 makes every weight 1.0, so the "
                "router learns nothing: set normalize_weights to False"
            )
