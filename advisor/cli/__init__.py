"""The command line: parse, call one function of the library, print a table or one JSON object."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import NoReturn

from advisor.errors import AdvisorError

BAD_INPUT = 2


def run(argv: Sequence[str]) -> int:
    """Return the exit code of a command line: 0 an answer, 2 bad input with one sentence on stderr."""
    from pydantic import ValidationError

    from advisor.cli.commands import build_parser, command_parser
    from advisor.cli.parse import complain, flag_of, require, unknown_word

    try:
        parser = build_parser(argv[0] if argv else "")
        args, extra = parser.parse_known_args(list(argv))
        if extra:
            raise unknown_word(command_parser(parser, args.command), extra[0])
        require(args)
        return int(args.run(args))
    except AdvisorError as error:
        complain(str(error))
    except ValidationError as error:
        from advisor.schema import first_error

        text = first_error(error)
        field = text.split("'")[1] if text.count("'") > 1 else ""
        complain(text.replace(f"'{field}'", flag_of(field.removeprefix("prefix.").split(".")[0]), 1) if field else text)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UnicodeError) as error:
        complain(str(error))
    return BAD_INPUT


def _leave_out_plugins() -> None:
    """Let pydantic look through no installed package for plugins that would watch its validation.

    Its switch for that alone would still import what reads packages (importlib.metadata with email, zipfile and csv): a
    fifteenth of a `recommend`. Its loader is therefore replaced by one that finds none; where a release of pydantic has
    none under this name, the switch is what is left.
    """
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if os.environ["PYDANTIC_DISABLE_PLUGINS"] == "__all__":
        loader = ModuleType("pydantic.plugin._loader")
        vars(loader)["get_plugins"] = tuple
        sys.modules.setdefault(loader.__name__, loader)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line of this process and exit."""
    # almost all that a command makes lives until it has answered, so that walking it in search of cycles is a tenth of
    # the time: seldom while it runs, and not once more at its end
    gc.set_threshold(200_000, 50, 1000)
    _leave_out_plugins()
    # and numpy starts no threads for large matrices, which there are none of: a process with one thread can be forked
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader (head, less) has what it wanted; Python must not complain when it closes stdout
        sys.stderr.close()
        code = 0
    except KeyboardInterrupt:
        code = 130
    gc.freeze()
    sys.exit(code)


def entry() -> NoReturn:
    """Be the command `advisor`: `main`, and no farewell to every object where nothing but this thread is left.

    Python takes apart all modules before a process ends, which takes as long as some replays; the system takes the
    memory back anyway. What asked to be called at the end is called.
    """
    code: int | str | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    threading = sys.modules.get("threading")
    if not isinstance(code, int) or (threading is not None and threading.active_count() > 1):
        sys.exit(code)
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
