# SPDX-License-Identifier: Apache-2.0
"""The command line: parses, calls, prints. Exit code 0, 2 for the user's mistakes, 1 for a failed verification or a bug."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

import isthmus
from isthmus.commands import bundles, compiling, listing, models, selecting
from isthmus.commands import zoo as zoo_commands
from isthmus.errors import IsthmusError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="One verified int8 ONNX graph, every edge target.")
zoo = typer.Typer(no_args_is_help=True, help="The networks that ship with isthmus.")
app.add_typer(zoo, name="zoo")


def main() -> None:
    """Entry point. `--debug` anywhere shows tracebacks."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app()
    except IsthmusError as error:
        _fail(str(error), debug, error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written is left", debug, 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}", debug, 2)
    except Exception as error:  # noqa: BLE001  # a bug: say so in one line, and how to see where
        _fail(f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)", debug, 1)


def _fail(sentence: str, debug: bool, code: int) -> None:
    if debug:
        traceback.print_exc()
    print(f"isthmus: {sentence}", file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(isthmus.__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    return None


app.command()(compiling.demo)
app.command("compile")(compiling.compile_command)
app.command()(bundles.verify)
app.command()(bundles.bench)
app.command()(bundles.run)
app.command()(bundles.report)
app.command()(models.cost)
app.command()(models.lint)
app.command()(models.sensitivity)
app.command()(selecting.select)
app.command("targets")(listing.targets_command)
app.command()(listing.doctor)
zoo.command("list")(zoo_commands.zoo_list)
zoo.command("show")(zoo_commands.zoo_show)
zoo.command("train")(zoo_commands.zoo_train)
zoo.command("table")(zoo_commands.zoo_table)


if __name__ == "__main__":
    main()
