"""`moekit compress`: profile, plan by named methods, apply."""

from moekit.cli import _receipt
from moekit.cli._groups import grouped
from moekit.cli._options import HeldOut, Json, Machine, Model, Observed, OutputDir, Task, With, Written
from moekit.cli._work import beside, carried_out, check_output, held_out, leads, planned


@grouped
def compress(
    model: Model,
    output: OutputDir,
    *,
    methods: With = [],  # noqa: B006
    seen: Observed,
    task: Task = None,
    aside: HeldOut = [],  # noqa: B006
    written: Written,
    machine: Machine,
    as_json: Json = False,
) -> None:
    """Profile a model, let named methods plan, and apply the plan: `fit` lets a solver choose instead.

    \b
    Examples:
      moekit compress moekit:mini --with easy-ep:keep=0.5 --with rtn:bits=8 --text notes.txt --output out/small
      moekit compress ./model --with reap:keep=0.75 --profile m.profile --output out/m75 --max-ram 4GB
      moekit compress ./model --with eep:fitness=error --task task.jsonl --held-out notes.txt --output out/pruned
    """
    check_output(output, written.overwrite)
    from moekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    checked = held_out(aside, checkpoint)
    from moekit.plan import values

    with values.spooling(beside(output)) as spool:
        made = planned(checkpoint, model, methods, seen, machine, task)
        if not leads():
            return
        text = checked or made.aside
        receipt = carried_out(checkpoint, made.plan, output, text, written, machine, f"compress {model}")
    spool.tidy()
    _receipt.tell(receipt, output, as_json)
