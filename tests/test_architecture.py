"""Which module may import which: the drawing in docs/architecture.md, held to the source. And what is written once."""

import ast
import functools
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The rooms of ssmzoo, lowest first: a room may import those in lines above its own, and itself. A room is a module or a
# folder right below the package; "ssmzoo" is what `import ssmzoo` gives.
LAYERS = (
    "written",  # what linear maps ask
    "bidirectional devices files interrupts linear plain screen state steady ties token_shift wide",  # serve everything
    "norm options yaml_text",
    "quantized",  # maps with weights in few bits, which mixers and configs know of
    "mixer mlp",  # the interfaces of what mixes tokens and of what mixes channels
    "cache init lower_bounds rate registry value_residual",
    "lti",  # what S4 and S4D share
    "mixers",
    "feed",
    "config",
    "block ends generate inputs pooling",
    "decoding",
    "model",
    "checkpoints engine footprint",
    "calibrating parallel pretrained",
    "building quantizing swapping",
    "linearizing",
    "ssmzoo",
    "integrations planning testing train",
    "bench proof serve",
    "commands",
    "cli",
    "__main__",
)
LEVELS = {room: level for level, line in enumerate(LAYERS) for room in line.split()}

# Likewise of ssmkernels. An op's spec.py and peers.py describe it to check and bench.
KERNEL_LAYERS = ("core", "native masks", "ops", "ssmkernels", "check", "compat testing", "bench")
KERNEL_LEVELS = {room: level for level, line in enumerate(KERNEL_LAYERS) for room in line.split()}
DESCRIPTIONS = ("spec", "peers")

SOURCES = sorted((ROOT / "ssmzoo").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "ssmkernels").rglob("*.py"))


def test_the_drawing_names_every_room():
    """But for the helpers below all others, which it calls smaller."""
    drawing = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    rooms = {room for line in LAYERS[2:] for room in line.split()} - {"yaml_text", "ssmzoo", "__main__"}
    assert {room for room in rooms if f" {room}.py" not in drawing and f" {room}/" not in drawing} == set()


def module_of(path: Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT / "kernels" if path in KERNELS else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES + KERNELS}


@functools.cache
def names_imported(module: str) -> frozenset[str]:
    """Dotted names of what a module imports of the project, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in found if name.split(".")[0] in ("ssmzoo", "ssmkernels"))


def imported(module: str) -> set[str]:
    """The modules that a module imports."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names_imported(module)} - {module}


def room_of(module: str) -> str:
    """The room of a module; the package's own name for the package itself."""
    package, *rest = module.split(".")
    return rest[0] if rest else package


ZOO = [module_of(path) for path in SOURCES]


def test_every_room_has_a_layer():
    assert {room_of(module) for module in ZOO} == set(LEVELS)


def test_imports_point_down():
    wrong = [
        f"{module} imports {name}, which is not below it"
        for module in ZOO
        for name in sorted(imported(module))
        if name.startswith("ssmzoo")
        and room_of(name) != room_of(module)
        and LEVELS[room_of(name)] >= LEVELS[room_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_of_the_kernels_point_down():
    modules = [module_of(path) for path in KERNELS]
    assert {room_of(module) for module in modules} == set(KERNEL_LEVELS)
    wrong = [
        f"{module} imports {name}, which is not below it"
        for module in modules
        if not (room_of(module) == "ops" and module.split(".")[-1] in DESCRIPTIONS)
        for name in sorted(imported(module))
        if room_of(name) != room_of(module) and KERNEL_LEVELS[room_of(name)] >= KERNEL_LEVELS[room_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_kernels_do_not_know_the_zoo():
    wrong = [module for module in MODULES if module not in ZOO and any("ssmzoo" in name for name in imported(module))]
    assert not wrong


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter({module: imported(module) for module in ZOO}).prepare()  # CycleError names a cycle


def test_private_names_stay_in_their_room():
    """A name that begins with an underscore is imported within the folder that holds it alone."""
    wrong = []
    for module in ZOO:
        for name in names_imported(module):
            parts = name.split(".")
            for i, part in enumerate(parts):
                if part.startswith("_") and not part.startswith("__") and module.split(".")[:i] != parts[:i]:
                    wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def _functions():
    """Every function of both packages: where it is, its parameters, and the names of its decorators."""
    for path in SOURCES + KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                calls = (decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call))
                names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", {a.arg for a in arguments}, names


def test_signatures_of_ops_are_written_twice_at_most():
    """Once where the op is declared, and once where a further function takes all the same arguments.

    Ops with fewer than six arguments are left out: other functions may well take those and more.
    """
    functions = list(_functions())
    signatures = [(place, names - {"implementation"}) for place, names, by in functions if by & {"op", "step_of"}]
    assert len(signatures) > 20
    for place, names in signatures:
        others = [other for other, theirs, _ in functions if names <= theirs and other != place]
        assert len(names) < 6 or len(others) < 2, f"the arguments of {place} stand again at {', '.join(others)}"
