"""Makes NormOpt known in the Python processes that a script under `hf-normopt run` starts.

`hf-normopt run` puts this folder at the front of `PYTHONPATH`, where `python` looks for a
`sitecustomize` to import when it starts. Once the process has imported transformers' training
arguments, this one imports the package; a process that never does is left as it is. A
`sitecustomize` of the user's own, which this one shadows, runs as it would without.

The process may be any Python from 3.8 on, with or without the package. So this file imports only
what is there already, and what fails here costs one line on stderr, never the process.
"""

import os
import sys


class NormOptHook:
    """A finder that passes on what others find, to learn when transformers has been imported."""

    def __init__(self) -> None:
        self.under_way: list = []  # modules of transformers whose code runs now, in any thread
        self.done = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """What the finders behind this one find."""
        finders: list = sys.meta_path
        if self.done or name.partition(".")[0] != "transformers" or self not in finders:
            return None
        for finder in finders[finders.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                try:
                    self.watch_inplace(name, spec.loader)
                except Exception as error:  # a loader that has no attributes of its own
                    self.done = True
                    warn(error)
                return spec
        return None

    def watch_inplace(self, name: str, loader: object) -> None:
        """Let a loader tell when the code of its module has run; it stays of its class."""
        own, execute = vars(loader), loader.exec_module  # type: ignore[attr-defined]
        before = own.get("exec_module")

        def exec_module(module: object) -> None:
            own["exec_module"] = before
            if before is None:
                del own["exec_module"]
            self.under_way.append(name)
            try:
                execute(module)
            finally:
                self.under_way.remove(name)
            # Inside of another one, the package would find that one half made.
            if not self.under_way and "transformers.training_args" in sys.modules:
                self.import_package()

        own["exec_module"] = exec_module

    def import_package(self) -> None:
        """Import the package, once, which makes its names known to transformers."""
        if self.done:
            return
        self.done = True
        try:
            import hf_normopt  # noqa: F401
        except Exception as error:
            warn(error)


def warn(error: Exception) -> None:
    """Say in one line that this process goes on without NormOpt."""
    reason = " ".join(str(error).split())
    try:  # noqa: SIM105 (contextlib would be one more import)
        sys.stderr.write(
            f"hf-normopt run: optim='normopt' is unknown in process {os.getpid()} "
            f"({sys.executable}), where hf_normopt cannot be imported: "
            f"{type(error).__name__}: {reason}\n"
        )
    except Exception:
        pass  # there is no stderr


def import_shadowed_inplace() -> None:
    """Import the `sitecustomize` behind this one, which then has the name to itself."""
    folder, ours = os.path.dirname(__file__), sys.modules.pop("sitecustomize", None)
    at = sys.path.index(folder) if folder in sys.path else None
    if at is not None:
        del sys.path[at]
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":  # as `site` has it: there need not be one
            raise
    finally:
        if at is not None:
            sys.path.insert(at, folder)
        if ours is not None:
            sys.modules.setdefault("sitecustomize", ours)


if not any(type(finder).__name__ == "NormOptHook" for finder in sys.meta_path):
    sys.meta_path.insert(0, NormOptHook())  # type: ignore[arg-type]
import_shadowed_inplace()
