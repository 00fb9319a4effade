"""Train a DCFormer or its Transformer baseline.

    deepspeed launch/train.py CONFIG.yaml [MORE.yaml ...] [key=value ...]
    torchrun --nproc-per-node N launch/train.py ...
    srun python launch/train.py ...          (with MASTER_ADDR and MASTER_PORT set)
    python launch/train.py ...               (one process)

YAML files are merged in order, later wins, then key=value. `python tools/check_config.py --reference` lists
every key; `python tools/check_config.py CONFIG.yaml ...` finds what would keep a run from starting.

Exit code: 0 done, 2 settings, data or checkpoint do not fit or training diverged, 75 stopped by a signal with a
checkpoint written (the same command resumes), 130 interrupted before training began or twice, 1 anything else.
torchrun turns every code but 0 into 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

DONE, FAILED, UNFIT, SIGNAL, INTERRUPTED = 0, 1, 2, 75, 130


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml|key=value", help="settings, in order")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options, unknown = parser.parse_known_args(arguments)
    if not options.settings and not unknown:
        parser.error("give a config, such as configs/quickstart.yaml")
    return train([*options.settings, *unknown])


def train(settings: list[str]) -> int:
    """Trains with these config files and ``key=value`` overrides; the exit code."""
    # Imported after the arguments are parsed: this takes seconds.
    from dcscale.config import ConfigError, check_config, load_arguments, raise_problems
    from dcscale.observe import Console
    from dcscale.parallel import LaunchError, discover, share_cores, start_distributed, stop_distributed
    from dcscale.train import REFUSALS, StopReason, build_trainer, summary_lines, write_summary

    environment = None
    try:
        environment = discover()
        console = Console(enabled=environment.is_main)
        loaded = load_arguments(settings)
        config = loaded.config
        raise_problems(check_config(config, environment.world_size), loaded.origins)
        share_cores(environment)
        start_distributed(environment, config.parallel.timeout_minutes)
        trainer = build_trainer(config, environment, console)
        try:
            stop_reason = trainer.fit()
            summary = write_summary(trainer, stop_reason)
        finally:
            trainer.close()
    except (ConfigError, LaunchError, FloatingPointError, *REFUSALS) as error:
        if environment is None or environment.is_main:
            print(f"error: {error}", file=sys.stderr)
        stop_distributed()
        return UNFIT
    except KeyboardInterrupt:
        if environment is None or environment.is_main:
            print("interrupted: earlier checkpoints are complete, the same command resumes from them", file=sys.stderr)
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    except Exception:
        # Other ranks may be waiting for this one; to leave the process group would be to wait for them in turn.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(FAILED)
    stop_distributed()
    console.line(f"ended      {stop_reason.value}")
    for line in summary_lines(summary):
        console.line(line)
    console.line(f"files      {trainer.run}; curves: tensorboard --logdir {trainer.run}")
    return SIGNAL if stop_reason is StopReason.SIGNAL else DONE


if __name__ == "__main__":
    sys.exit(main())
