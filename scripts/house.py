"""Measures the structure of the package: entries at its root, floors of its rooms, and circles of imports.

    python scripts/house.py
    python scripts/house.py path/to/another/checkout

A room is an entry at the root; its floor is one above the highest room that it imports. Imports for type checkers
count. Exits with 1 if there are more than 15 entries, more than 8 floors, or any circle among rooms or modules.
"""

import sys
from pathlib import Path

import grimp
import networkx


MOST_ENTRIES, MOST_FLOORS = 15, 8
Graph = dict[str, set[str]]


def graph_of_modules(root: Path) -> Graph:
    """The modules of `hf_detrkd` in a checkout, and what each imports; without the root, which imports when asked."""
    sys.path.insert(0, str(root))
    graph = grimp.build_graph("hf_detrkd", exclude_type_checking_imports=False, cache_dir=None)
    found = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    found.pop("hf_detrkd")
    return {module: imported - {"hf_detrkd"} for module, imported in found.items()}


def graph_of_rooms(modules: Graph) -> Graph:
    rooms: Graph = {}
    for module, imported in modules.items():
        room = module.split(".")[1]
        rooms.setdefault(room, set()).update({name.split(".")[1] for name in imported} - {room})
    return rooms


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(graph))
    return [sorted(group) for group in groups if len(group) > 1]


def floors(rooms: Graph) -> list[list[str]]:
    """Rooms by floor, the lowest first; rooms of a circle that stands in the way are left out."""
    placed: list[list[str]] = []
    below: set[str] = set()
    while rest := sorted(room for room in rooms if room not in below and rooms[room] <= below):
        placed.append(rest)
        below.update(rest)
    return placed


def main(argv: list[str]) -> int:
    root = Path(argv[0] if argv else Path(__file__).parents[1]).resolve()
    modules = graph_of_modules(root)
    rooms = graph_of_rooms(modules)
    entries = [path.name for path in (root / "hf_detrkd").iterdir() if path.name != "__pycache__"]
    levels, rings = floors(rooms), [*circles(rooms), *circles(modules)]
    for number, level in reversed(list(enumerate(levels, 1))):
        print(f"floor {number}: {', '.join(level)}")
    lost = len(rooms) - sum(map(len, levels))
    print(
        f"{len(entries)} entries, {len(levels)} floors, {len(rings)} circles"
        + (f", {lost} rooms above a circle" * bool(lost))
    )
    for ring in rings:
        print("circle:", ", ".join(ring))
    return int(len(entries) > MOST_ENTRIES or len(levels) > MOST_FLOORS or bool(rings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
