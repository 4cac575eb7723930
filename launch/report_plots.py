"""Which metric stands in which plot of a report, and which in its headlines."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure over steps: its file's name, a title, the unit of the y axis, and a label for each
    metric drawn in it.
    """

    stem: str
    title: str
    unit: str
    lines: dict[str, str]
    log: bool = False
    percent: bool = False


PLOTS = (
    Plot(
        "loss",
        "Loss",
        "nats per token",
        {"train/loss": "training", "validation/loss": "validation"},
        log=True,
    ),
    Plot(
        "bits_per_byte",
        "Bits per byte",
        "bits per byte of text",
        {"validation/bits_per_byte": "validation"},
        log=True,
    ),
    Plot(
        "gradient_norm",
        "Gradient norm",
        "global norm before clipping",
        {"train/gradient_norm": "training"},
        log=True,
    ),
    Plot("learning_rate", "Learning rate", "learning rate", {"train/learning_rate": "training"}),
    Plot("throughput", "Throughput", "tokens per second", {"train/tokens_per_second": "training"}),
    Plot(
        "mfu",
        "Model FLOPs utilisation (MFU)",
        "% of peak FLOP/s",
        {"train/mfu": "training"},
        percent=True,
    ),
    Plot(
        "data_wait",
        "Wait for data",
        "% of a step's time",
        {"train/data_wait_fraction": "training"},
        percent=True,
    ),
)
ROUTING = (
    Plot(
        "max_vio",
        "MaxVio",
        "largest load / mean − 1",
        {
            "router/max_vio": "mean of layers",
            "router/worst_max_vio": "worst layer",
            "validation/max_vio": "validation",
        },
    ),
    Plot(
        "load_entropy",
        "Entropy of the load",
        "over log E: 1 is even",
        {
            "router/load_entropy": "mean of layers",
            "router/worst_load_entropy": "worst layer",
            "validation/load_entropy": "validation",
        },
    ),
    Plot(
        "dropped",
        "Dropped assignments",
        "% of assignments",
        {
            "router/dropped_fraction": "mean of layers",
            "router/worst_dropped_fraction": "worst layer",
            "validation/dropped_fraction": "validation",
        },
        percent=True,
    ),
    Plot(
        "dead_experts",
        "Experts without a token",
        "experts, over all layers",
        {"router/dead_experts": "training"},
    ),
    Plot(
        "load_variation",
        "Variation of the load",
        "standard deviation / mean",
        {"router/load_variation": "training"},
    ),
    Plot(
        "balance_loss", "Balance loss, unweighted", "1 is even", {"router/balance_loss": "training"}
    ),
    Plot(
        "z_loss",
        "z-loss, unweighted",
        "(log-sum-exp of the logits)²",
        {"router/z_loss": "training"},
    ),
    Plot(
        "logit_norm",
        "Norm of the router's logits",
        "mean of tokens",
        {"router/logit_norm": "training"},
    ),
    Plot(
        "router_entropy",
        "Entropy of the router",
        "nats, mean of tokens",
        {"router/router_entropy": "training"},
    ),
    Plot(
        "top1_margin",
        "Margin of the likeliest expert",
        "probability",
        {"router/top1_margin": "training"},
    ),
    Plot(
        "bias_range",
        "Range of the biases",
        "largest − smallest, widest layer",
        {"router/bias_range": "training"},
    ),
)
SKIPPED = "train/skipped_steps"  # a running total, drawn as marks at the steps where it grew

# What a reader looks for first: metric, name, how its last value is written, and its unit.
HEADLINES = (
    ("validation/loss", "validation loss", "{:.4f}", "nats per token"),
    ("validation/bits_per_byte", "bits per byte", "{:.4f}", "of text"),
    ("train/loss", "training loss", "{:.4f}", "nats per token"),
    ("router/worst_max_vio", "worst MaxVio", "{:.2f}", "largest load / mean − 1"),
    ("router/dropped_fraction", "dropped", "{:.1%}", "of assignments"),
    ("train/tokens_per_second", "throughput", "{:,.0f}", "tokens per second"),
    ("train/mfu", "MFU", "{:.1%}", "of peak FLOP/s"),
    ("train/data_wait_fraction", "wait for data", "{:.1%}", "of a step's time"),
    (SKIPPED, "skipped updates", "{:,.0f}", "since the run began"),
)
