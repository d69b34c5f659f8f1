"""The six answers of `evidence.py` in words, written from the records, whichever way they point."""

from __future__ import annotations

from collections.abc import Iterable

from evidence_tables import Finals, Place, Record, format_estimate, table

from polyak.study.paired import Estimate, estimate, paired

UNITS = {"error": ("error", "points", 2), "nll": ("NLL", "nats", 3),
         "nll_scaled": ("NLL after temperature scaling", "nats", 3)}  # fmt: skip
ARMS = {"swa": "constant rate", "cyclic": "cyclic rate"}
SIGNS = {-1: "lower", 0: "not significant", 1: "higher"}
LEGEND = (
    "A difference is the mean over the seeds ± half its 95% interval, *not significant* if that "
    "contains 0; lower is better. *Weak* regularisation is flips; *strong* is flips, shifts by a "
    "pixel, and BatchNorm."
)


def answers(records: list[Record]) -> str:
    """A numbered list, an answer for each question whose records are there."""
    finals = Finals(records)
    if not finals.by_place:
        return ""
    found = [
        _own_iterate(finals), _annealed(finals), _surface(finals, records), _stale(finals),
        _each_step(finals), _budgets(finals),
    ]  # fmt: skip
    return LEGEND + "\n\n" + "\n".join(f"{n}. {said}" for n, said in enumerate(found, 1) if said)


def in_short(records: list[Record]) -> str:
    """For the README: SWA against annealed SGD in both regimes."""
    finals = Finals(records)
    rows = []
    for part in finals.main_parts():
        for arm, rate in ARMS.items():
            place, sgd = (*part, arm, "swa"), (*part, "sgd", "iterate")
            if place in finals.by_place:
                cells = [format_estimate(finals.difference(place, sgd, m), d)
                         for m, (_, _, d) in UNITS.items()]  # fmt: skip
                rows.append([part[0], rate, *cells])
    head = ["regularisation", "while averaging", *(f"{n}, {u}" for n, u, _ in UNITS.values())]
    return table(head, rows)


def _own_iterate(finals: Finals) -> str:
    said = []
    for part in finals.main_parts():
        own = (*part, "swa", "iterate")
        if own not in finals.by_place:
            continue
        pairs = [(kind.upper(), (*part, "swa", kind), own) for kind in ("swa", "ema")]
        said.append(_regime(part, (f"{name} {_told(finals, *p)}" for name, *p in pairs)))
    return _joined("Against the last iterate of its own run, constant rate, in error", said)


def _annealed(finals: Finals) -> str:
    said = []
    for part in finals.main_parts():
        for arm, rate in ARMS.items():
            place, sgd = (*part, arm, "swa"), (*part, "sgd", "iterate")
            told = (f"{UNITS[m][0]} {_told(finals, place, sgd, m)}" for m in UNITS)
            said.append(_regime(part, told, rate) if place in finals.by_place else "")
    return _joined("SWA against annealed SGD at equal budget", said)


def _surface(finals: Finals, records: list[Record]) -> str:
    longest = max(epochs for _, epochs in finals.parts())
    by_regime: dict[str, list[Record]] = {}
    for r in records:
        if r["kind"] == "surface" and r["epochs"] == longest:
            by_regime.setdefault(r["regime"], []).append(r)
    said = []
    for regime, found in by_regime.items():
        rise = {name: [r["rises"][name][-1] for r in found] for name in ("sgd", "iterate", "swa")}
        mean = {name: estimate(values).mean for name, values in rise.items()}
        sgd = _short(paired(rise["swa"], rise["sgd"]), "nats", 3)
        own = _short(paired(rise["swa"], rise["iterate"]), "nats", 3)
        barrier = max(r["barrier"] for r in found)
        loss = estimate([r["loss_at_checkpoints"] for r in found]).mean
        said.append(
            f"{regime}: the training loss rises by {mean['sgd']:.3f} nats from SGD, "
            f"{mean['iterate']:.3f} from the last iterate, {mean['swa']:.3f} from SWA (against SGD "
            f"{sgd}; against the iterate {own}); the highest barrier between averaged weights is "
            f"{barrier:.4f} nats where the loss is {loss:.3f}"
        )
    return _joined("How flat along random rays, and in one basin", said)


def _stale(finals: Finals) -> str:
    kinds = {"the iterate's": "swa-newest-statistics", "averaged ones": "swa-averaged-statistics"}
    said = []
    for part in finals.main_parts():
        held = {n: k for n, k in kinds.items() if (*part, "swa", k) in finals.by_place}
        told = (
            f"with {name} {_told(finals, (*part, 'swa', kind), (*part, 'swa', 'swa'))}"
            for name, kind in held.items()
        )
        said.append(_regime(part, told) if held else "")
    return _joined("SWA with stale BatchNorm statistics, against refreshed ones, in error", said)


def _each_step(finals: Finals) -> str:
    said = []
    for part in finals.main_parts():
        places = (*part, "swa", "swa-each-step"), (*part, "swa", "swa")
        if places[0] not in finals.by_place:
            continue
        told = (f"{UNITS[m][0]} {_told(finals, *places, m)}" for m in ("error", "nll"))
        said.append(_regime(part, told))
    return _joined("Averaging each step against each epoch", said)


def _budgets(finals: Finals) -> str:
    longest = max(epochs for _, epochs in finals.parts())
    said = []
    for part in sorted(part for part in finals.parts() if part[1] != longest):
        full = (part[0], longest, "sgd", "iterate")
        for who, place in (("SWA", (*part, "swa", "swa")), ("SGD", (*part, "sgd", "iterate"))):
            if place in finals.by_place and full in finals.by_place:
                told = (f"{UNITS[m][0]} {_told(finals, place, full, m)}" for m in ("error", "nll"))
                said.append(f"{who} of {part[1]} epochs: {', '.join(told)}")
    return _joined(f"How early: a shorter budget against SGD annealed over all {longest}", said)


def _told(finals: Finals, place: Place, base: Place, metric: str = "error") -> str:
    _, unit, digits = UNITS[metric]
    return _short(finals.difference(place, base, metric), unit, digits)


def _short(value: Estimate, unit: str, digits: int) -> str:
    return f"{format_estimate(value, digits).strip('*')} {unit} ({SIGNS[value.sign]})"


def _regime(part: tuple[str, int], told: Iterable[str], what: str = "") -> str:
    told = list(told)
    return "" if not told else f"{part[0]}{', ' + what if what else ''}: {', '.join(told)}"


def _joined(title: str, said: list[str]) -> str:
    parts = [part for part in said if part]
    return f"**{title}.** {'; '.join(parts)}." if parts else ""
