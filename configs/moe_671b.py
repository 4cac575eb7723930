"""DeepSeek-V3's experts and routing (DeepSeek-AI 2024, section 4.2), on grouped-query attention:
675B parameters, a token uses 41B of them.

Command:  python -m launch.train --config=configs/moe_671b.py --workdir=runs/moe_671b
Hardware: 1,024 accelerators of 80 GB: 4 experts of each layer on each of 64, their parameters split
          over 16 such groups, and all
          others over all. State and gradients are 10.5 GB on each.
Time, result: not measured. 6.3T tokens need 1.7e24 FLOPs: 48 days at 40 % of the peak of as many
          H100s.

Of each layer, what follows attention is the paper's. Attention is not: its latent attention (MLA)
is not here, and 128 heads of 128 with 8 key/value heads, as in Llama 3.1 405B, have a third more
parameters. Nor does the model predict a second token. The paper's balance factor 1e-4 is of a sum
over the sparse layers, here of a mean over 58. Its batch grows to 15,360, its biases stand still at
the end, its learning rate falls later, and its 14.8T tokens are more rows than an int32 counts. A
device has room for twice its mean load; the paper drops nothing. Text comes in bytes so far: the
vocabulary has the published size, and its cost.
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
