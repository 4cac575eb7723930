"""Trains a model with DeepSeek-V3's experts and routing: 675B parameters, a token uses 41B.

Experts and routing are those of DeepSeek-AI 2024, section 4.2. Attention is grouped-query.

Command:  python -m launch.train --config=configs/moe_671b.py --workdir=runs/moe_671b
Hardware: 1,024 H200 (128 hosts), or TPU v5p:8x8x16, in 16 groups of 64. Each device of a group has
          4 experts of each layer, whose parameters are split over the groups. All other parameters
          are split over all devices. State and gradients are 10.5 GB on each.
Time, result: not measured. 6.3T tokens need 1.7e24 FLOPs: 48 days at 40 % of the peak of as many
          H100s.

The feed-forward parts are the paper's. Attention is not: instead of latent attention (MLA) there
are 128 heads of 128 with 8 key/value heads, as in Llama 3.1 405B, which have a third more
parameters. The model does not predict a second token either. The paper multiplies a sum over the
sparse layers by its balance factor of 1e-4; the config's factor belongs to a mean over 58 layers.
In the paper the batch grows to 15,360, the biases stop moving near the end, the learning rate falls
later, and training takes 14.8T tokens. A device has room for twice its mean load, and rows beyond
that are dropped; the paper drops nothing. So far text is read as bytes. The vocabulary has the
published size all the same, so a step costs as much as with the published vocabulary.
"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=61,
        model_dim=7168,
        feed_forward_dim=18_432,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
    )
    config.model.update(vocab_size=129_280, remat="full")
    config.model.moe.update(
        num_experts=256,
        experts_per_token=8,
        expert_dim=2048,
        num_shared_experts=1,
        first_dense_layers=3,
    )
    config.model.moe.update(
        router="sigmoid", num_groups=8, groups_per_token=4, normalize_weights=True, weight_scale=2.5
    )
    config.model.moe.update(bias_update_rate=0.001, balance_weight=58 * 1e-4, balance_scope="row")
    config.model.moe.update(dispatch="dropless", exchange="ragged_all_to_all")
    config.data.sequence_length = 4096
    config.optimizer.update(
        learning_rate=2.2e-4, final_learning_rate_fraction=0.033, warmup_fraction=0.02
    )
    config.mesh.update(data=1, fsdp=-1, expert=64)
    config.train.update(batch_size=15_360, accumulation=15, steps=100_000)
    config.train.update(eval_every=1000, eval_batches=5, checkpoint_every=500, keep_every=10_000)
    return config
