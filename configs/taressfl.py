"""TAResSFL, deployed: clients keep the pre-trained client model frozen, MocoSFL trains the server.

    python -m mocosfl_jax.main --config configs/taressfl.py --workdir runs/taressfl \
        --config.init_from=runs/taressfl_pretrain --config.num_clients=1000 \
        --config.classes_per_client=2

Clients receive their model once; no gradient is sent to them, and none of their models is averaged.
With --config.init_parts=client the server starts at random.
"""

from ml_collections import ConfigDict

from mocosfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.dataset = "cifar10"
    config.init_from = "runs/taressfl_pretrain"
    config.mean = (0.4914, 0.4822, 0.4465)
    config.std = (0.2470, 0.2435, 0.2616)
    config.cut = 2
    config.bottleneck = "C4S2"
    config.client_learning_rate = 0.0
    config.learning_rate = 0.001
    # What is frozen needs no state.
    config.client_state = "stateless"
    config.align_momentum = True
    return config
