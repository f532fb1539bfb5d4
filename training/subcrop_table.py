"""Present the results of `subcrop_study` as a table, sentences and points for a plot."""

MIN_PIXELS = 10  # smallest object that counts: 10 % of it is at least one pixel
OTHERS = (0.0, 0.001, 0.005)  # another thing counts if it takes up at least this share of the subcrop


def table(result: dict) -> list[list[str | float | None]]:
    """Return the table: a header, one line for each class, and lines for all things. Shares are in per cent."""
    pairs = result["all_things"] or {}
    columns = [(flow, gap) for flow, by_gap in pairs.items() for gap in by_gap]
    single = [f"single, others of {f'{100 * least:g} %' if least else f'{MIN_PIXELS} px'}" for least in OTHERS]
    held = [f"held of shown: {flow}, {gap} s" for flow, gap in columns]
    count = result["subcrops_a_frame"]
    lines = [["", "pixels", "hit", "lift", f"hit in {count}", f"in {count} pixels", *single, "instances", *held]]
    for name, values in result["classes"].items():
        shares = [*(values["single"] or [None] * len(OTHERS))]
        shares += [values["held_of_shown"] and values["held_of_shown"][flow][gap] for flow, gap in columns]
        first = [_percent(values["pixel_share"]), _percent(values["hit"]), round(values["lift"], 2)]
        first += [_percent(values["hit_in_frame"]), _percent(values["random_pixel_in_frame"])]
        cells = list(map(_percent, shares))
        alone, shown = cells[: len(OTHERS)], cells[len(OTHERS) :]
        counted = (
            values["instances_counted"] or None if any(shown) else None
        )  # number of instances behind the shares to the right
        lines.append([name, *first, *alone, counted, *shown])
    rows = {
        "all things": "held_of_shown",
        "all things, pairs across with every flow": "held_of_shown_same_pairs",
        "all things, those not shown too": "held_of_hit",
        "pairs within one frame, left out above": "own_frame",
    }
    for title, key in rows.items() if pairs else ():
        lines.append(
            [
                title,
                *[None] * (len(lines[0]) - 1 - len(columns)),
                *(_percent(pairs[flow][gap][key]) for flow, gap in columns),
            ]
        )
    return lines


def notes(result: dict) -> list[str]:
    """Return sentences with facts that do not fit into the table."""
    none, one, several = (f"{100 * result['subcrops_with_things'][name]:.1f} %" for name in ("none", "one", "several"))
    facts = (
        f"{result['num_subcrops']:,} subcrops in {result['frames']} {'drives' if result['all_things'] else 'frames'} of "
        f"{result['height']}x{result['width']}. Of all of them {one} hit one thing alone, {several} several, {none} none."
    )
    held = result.get("held_note") or "instances: that the shares to the right of it rest on, where they are fewest."
    return [facts, held[0].upper() + held[1:]]


def scatter(result: dict) -> dict:
    """Return points for a plot, in per cent: a class's share of the pixels (x), and how often a subcrop and a random pixel hit it."""
    shown = {name: values for name, values in result["classes"].items() if values["hit"] and values["pixel_share"]}
    pixels = [_percent(values["pixel_share"]) for values in shown.values()]
    series = {"a random pixel": pixels, "a subcrop": [_percent(values["hit"]) for values in shown.values()]}
    labels = {"xlabel": "share of the pixels, %", "ylabel": "hits an object of the class, %"}
    return {"names": list(shown), "x": pixels, "series": series, **labels}


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)
