"""The config of sparse layers: which have experts, and how tokens reach them."""

import dataclasses
from fractions import Fraction
from typing import Literal

from moe.config.checks import (
    ConfigError,
    check_not_negative,
    check_positive,
    check_range,
    check_types,
    computed,
    nearest_divisors,
)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Which layers have experts, how a router chooses among them, and how tokens travel to those
    chosen.
    """

    num_experts: int = 0  # routed experts of a sparse layer; 0 leaves every layer dense
    experts_per_token: int = 2  # routed experts that a token passes
    expert_dim: int = 352  # feed-forward width of one expert
    num_shared_experts: int = (
        0  # experts that every token passes, as one feed-forward part so many times as wide
    )
    first_dense_layers: int = 0  # layers before the first sparse one
    layer_period: int = 1  # after those, the last of every so many layers is sparse
    # Scores: softmax over the experts, or a sigmoid of each. "hash" chooses by the token alone;
    # with "expert_choice" experts choose tokens.
    router: Literal["softmax", "sigmoid", "hash", "expert_choice"] = "softmax"
    # Divides a token's combine weights by their sum, which makes a softmax over its experts. None
    # does so but in two cases, where True is refused: a single weight over itself is 1 whatever
    # the router says, and with "expert_choice" weights are probabilities.
    normalize_weights: bool | None = None
    weight_scale: float = 1.0  # what combine weights are multiplied by
    num_groups: int = 1  # groups of consecutive experts, of which a token chooses first
    groups_per_token: int = 1  # groups of experts that a token chooses
    # in training, the router's input is multiplied by a uniform draw between 1 - jitter and 1 +
    # jitter
    jitter: float = 0.0
    balance_weight: float = 0.01  # of the balance loss, a mean over the sparse layers
    balance_scope: Literal["row", "batch"] = (
        # over which load and probability are balanced; a batch is a microbatch, on all hosts
        "batch"
    )
    z_weight: float = 0.0  # of the mean squared log-sum-exp of the router's logits
    bias_update_rate: float = 0.0  # above 0, biases follow the load and steer the choice
    # "dense" computes every expert for every token, "capacity" gives each expert a fixed number of
    # rows, and "dropless" sorts the rows by their experts.
    dispatch: Literal["dense", "capacity", "dropless"] = "dropless"
    capacity_factor: float = 1.25  # an expert takes so many times its share of a row's tokens
    priority: Literal["position", "probability"] = (
        "position"  # who stays where an expert is full: the earlier, or the more probable
    )
    # How rows travel between the devices of the mesh's expert axis.
    exchange: Literal["all_gather", "all_to_all", "ragged_all_to_all"] = "all_gather"
    receive_factor: float = (
        2.0  # rows that a device has room for in a ragged exchange, over their mean number
    )

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
        if not computed(self, "receive_factor") >= 1:
            raise ConfigError(
                f"receive_factor={self.receive_factor} has no room for an even load: set receive_factor to 1.0 or more"
            )
        if self.num_experts:
            self._check_choice()
            self._check_pairs()

    @property
    def normalized(self) -> bool:
        """Whether weights are divided by their sum: `normalize_weights`, or what its None means."""
        if self.normalize_weights is None:
            return self.router == "hash" or (
                self.router != "expert_choice" and self.experts_per_token > 1
            )
        return self.normalize_weights

    @property
    def row_share(self) -> Fraction:
        """The part of a row's tokens that an expert has room for: capacity_factor A / E, exactly.

        The factor is taken as it is written, in decimals: 1.2 is 6/5.
        """
        return Fraction(str(self.capacity_factor)) * self.experts_per_token / self.num_experts

    def _check_choice(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}: "
                f"set experts_per_token to at most {self.num_experts}"
            )
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}: "
                f"set num_groups to {nearest_divisors(self.num_experts, self.num_groups)}"
            )
        if self.groups_per_token > self.num_groups:
            raise ConfigError(
                f"groups_per_token={self.groups_per_token} is more than num_groups={self.num_groups}: "
                f"set groups_per_token to at most {self.num_groups}"
            )
        reach = self.groups_per_token * self.num_experts // self.num_groups
        if self.experts_per_token > reach:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} is more than the {reach} experts of groups_per_token={self.groups_per_token} "
                f"groups: set experts_per_token to at most {reach}"
            )

    def _check_pairs(self) -> None:
        for name, value, other, values, wanted in (
            (
                "exchange",
                "all_to_all",
                "dispatch",
                ("capacity",),
                "every device sends as many rows as every other",
            ),
            (
                "exchange",
                "ragged_all_to_all",
                "dispatch",
                ("dropless",),
                "rows are sent in the order of their experts",
            ),
            (
                "router",
                "expert_choice",
                "dispatch",
                ("dense", "capacity"),
                "each expert takes a fixed number of tokens",
            ),
        ):
            if getattr(self, name) == value and getattr(self, other) not in values:
                options = " or ".join(repr(option) for option in values)
                raise ConfigError(
                    f"{name}={value!r} does not go with {other}={getattr(self, other)!r}, for {wanted}: set {other} to {options}"
                )
        if self.router in ("hash", "expert_choice") and self.bias_update_rate:
            raise ConfigError(
                f"bias_update_rate={self.bias_update_rate} steers nothing with router={self.router!r}: set bias_update_rate to 0.0"
            )
        if self.normalize_weights and self.router == "expert_choice":
            raise ConfigError(
                "normalize_weights=True normalizes nothing with router='expert_choice', whose weights are probabilities: "
                "set normalize_weights to False"
            )
        if self.normalize_weights and self.router != "hash" and self.experts_per_token == 1:
            raise ConfigError(
                "normalize_weights=True makes the weight of experts_per_token=1 expert 1.0 and teaches the router nothing: "
                "set normalize_weights to False"
            )
        if self.router in ("hash", "expert_choice") and self.num_groups > 1:
            raise ConfigError(
                f"num_groups={self.num_groups} limits nothing with router={self.router!r}: set num_groups to 1"
            )
