"""The application: its commands in the order one uses them, and what becomes of errors."""

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

from moekit.cli.apply import apply
from moekit.cli.build import build
from moekit.cli.compare import compare
from moekit.cli.compress import compress
from moekit.cli.demo import demo
from moekit.cli.eval import evaluate
from moekit.cli.export import export
from moekit.cli.fit import fit
from moekit.cli.inspect import inspect
from moekit.cli.league import league
from moekit.cli.patterns import patterns
from moekit.cli.place import place
from moekit.cli.plan import plan
from moekit.cli.profile import profile
from moekit.cli.recover import recover
from moekit.cli.reproduce import reproduce
from moekit.cli.retrieve import retrieve
from moekit.cli.run import run
from moekit.cli.serve import serve
from moekit.cli.systems import systems
from moekit.cli.train import train
from moekit.cli.tune import tune
from moekit.cli.verify import verify
from moekit.errors import MoekitError

USER_ERROR, INTERRUPTED = 2, 130
COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "profile": profile,
    "plan": plan,
    "fit": fit,
    "apply": apply,
    "compress": compress,
    "patterns": patterns,
    "retrieve": retrieve,
    "recover": recover,
    "build": build,
    "train": train,
    "league": league,
    "export": export,
    "compare": compare,
    "verify": verify,
    "run": run,
    "serve": serve,
    "tune": tune,
    "place": place,
    "eval": evaluate,
    "systems": systems,
    "reproduce": reproduce,
    "demo": demo,
}
# Typer may carry a click of its own inside it, so the base of its errors is found, not imported.
_ParserError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EFBIG}

app = typer.Typer(
    help="Open any Mixture-of-Experts model, see what its experts do, fit it to a size, and prove nothing was lost.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 a command's own verdict is no, 2 the user's mistake, 130 interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(args=arguments or ["--help"], prog_name="moekit", standalone_mode=False) or 0
    except MoekitError as error:
        return _complain(str(error))
    except _ParserError as error:
        return _complain(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _complain(f"{error.filename or 'the output'}: {error.strerror}; free space or choose another --output")
    if code == INTERRUPTED:
        sys.stderr.write("moekit: interrupted; what was finished is kept, give the same command again to go on\n")
    return code


def _complain(message: str) -> int:
    """One line, whatever the message holds."""
    sys.stderr.write(f"moekit: {' '.join(message.split())}\n")
    return USER_ERROR
