"""Checks that `accelerate launch` started the processes that it was asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping


WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of torchrun and MPI


def check_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses `accelerate launch --cpu --num_processes 2`, which starts a single process unless MPI starts it.

    accelerate sets `MASTER_ADDR` for several processes; on the CPU it then starts one, which no launcher tells the
    number of processes.

    Raises:
        ValueError: several processes were asked for on the CPU, and one was started.
    """
    asked = environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in environment
    if asked and not any(name in environment for name in WORLD_SIZES):
        raise ValueError(
            "accelerate launch was asked for several processes on the CPU, but --cpu starts only one: pass "
            "`--multi_gpu --num_processes 2` to accelerate launch and --use_cpu to the script, or use `hf-detrkd`, "
            "which does so by itself. With one process, unset MASTER_ADDR."
        )
