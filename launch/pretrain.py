"""`farskip pretrain`: train a mixture-of-experts model from scratch, under any wiring."""

from functools import partial
from pathlib import Path

from farskip.launch.config import PretrainConfig
from farskip.launch.hydra_command import run_hydra
from farskip.launch.ranks import Ranks, print_on_first_rank, torchrun_ranks
from farskip.launch.run_folder import held_folder

INTRO = """
usage: farskip pretrain data.path=DIR [key=value ...]
       torchrun --nproc-per-node=8 --no-python farskip pretrain data.path=DIR [key=value ...]

Trains a model from scratch on text: a folder of text, JSONL or Parquet files, or a saved `datasets` folder. Leaves the
model in <run.folder>/model, in transformers' format.
"""


def main(argv: list[str]) -> int:
    """Entry of the command."""
    return run_hydra("pretrain", PretrainConfig, _start, argv, intro=INTRO, announce=print_on_first_rank)


def _start(config: PretrainConfig) -> bool:
    with torchrun_ranks(config.run) as ranks, held_folder(Path(config.run.folder), ranks.rank):
        return pretrain(ranks, config)


def pretrain(ranks: Ranks, config: PretrainConfig) -> bool:
    """Train from scratch and export. A collective.

    Returns:
        False when it was asked to stop before the end: nothing is exported, the run can be resumed.
    """
    from farskip.launch import job
    from farskip.launch.staged_rewiring import stages_of
    from farskip.models.fresh import check_settings
    from farskip.models.surgery import wiring_of
    from farskip.objectives import PretrainObjective
    from farskip.trainer import StopReason
    from farskip.wiring import Wiring

    folder = Path(config.run.folder)
    job.check_run(config, folder, ranks, needs_heldout=config.training.heldout.every_steps > 0)
    check_settings(config.model.family, config.model.config)
    tokenizer, data = job.build_text(config.data, config.parallel, ranks)
    mesh = job.build_job_mesh(config.parallel, ranks)
    model = job.build_spread(config.model, tokenizer, config.wiring, config.parallel, ranks, mesh)
    wiring = wiring_of(model)
    start = Wiring.named("ordinary", wiring.num_layers)
    stages = stages_of(config.wiring, start, wiring, config.training.num_steps)
    precision = config.training.precision
    prepared = job.prepare(model, config.parallel, config.balance, ranks, mesh, precision=precision)
    objective = PretrainObjective(prepared.language_model, chunk_tokens=config.training.loss_chunk_tokens)
    times = job.tune(prepared, objective, data, config.parallel, precision)
    result = job.run_training(
        prepared,
        objective,
        data,
        config.training,
        folder,
        ranks,
        on_start=partial(job.write_plan, prepared, config, folder, ranks, times),
        resume=config.run.resume,
        trace_steps=config.profile.steps,
        stages=stages,
    )
    if result.reason is StopReason.shutdown:
        return False
    job.export(prepared, tokenizer, folder / "model", ranks)
    return True
