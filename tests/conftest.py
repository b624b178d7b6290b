"""Settings of all tests."""

import os

from hypothesis import HealthCheck, settings

# a shell in a Slurm job, under torchrun or behind a proxy would hand these to every trainer and download of the tests
OF_A_JOB = ("SLURM_", "TORCHELASTIC_", "WANDB_")
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in [name for name in os.environ if name.startswith(OF_A_JOB) or name in (*OF_A_RANK, "NO_COLOR")]:
    del os.environ[name]
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

# no deadline, no limit to the time that examples take: a loaded machine is slow, not wrong
settings.register_profile("longhaul", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("longhaul")
