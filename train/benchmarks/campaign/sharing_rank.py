"""One of several ranks that share a GPU, which NCCL refuses: `train/pretrain.py`, its gradients sent by gloo."""

import runpy
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from common.errors import exit_on_user_error
from common.paths import PROJECT
from train.settings.command_line import read_config


def main() -> int:
    read_config(sys.argv[1:])  # what is wrong with the options is answered before torch is imported
    import torch.distributed as dist

    connect = dist.init_process_group

    def connect_by_gloo(_: str, **options: Any) -> None:
        options.pop("device_id", None)
        connect("gloo", **options)

    dist.init_process_group = connect_by_gloo  # type: ignore[assignment]
    runpy.run_path(str(PROJECT / "train" / "pretrain.py"), run_name="__main__")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
