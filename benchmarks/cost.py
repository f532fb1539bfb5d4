"""
Cost against size: time, FLOPs and memory of a step when one setting at a time is changed. Readers of the paper asked for this.

    python benchmarks/cost.py --config street --per_device_train_batch_size 4
    python benchmarks/cost.py --config bdd100k_r50 --flow_weights random --bf16 --per_device_train_batch_size 8    # on a GPU
    python benchmarks/cost.py --config street --only dense_stride                                               # 8 against 1
    python benchmarks/cost.py --config bdd100k_r50 --bf16 false --flow_weights random --per_device_train_batch_size 1 --count_only

Takes the flags of training/pretrain.py (its flow: dis, RAFT or unflow); the first row is that recipe unchanged. Every row runs in its own
process. Milliseconds are processor time (of all threads) on a CPU, and elapsed time on a GPU. On a GPU, `ms_a_pair` leaves out DIS, which
the workers of a run compute (`flow_ms` is its time). With --count_only each row is one step, with its FLOPs and memory but no times.
"""

import dataclasses
import statistics
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import OurStep, benchmark_parser, medians, print_table, step_recipe, write_json
from benchmarks.contenders import Contender, TooLarge
from training.recipe import Recipe


def variants(recipe: Recipe) -> list[tuple[str, str, Recipe]]:
    """List (name of the changed setting, its value, the recipe), the unchanged recipe first."""

    def changed(**values) -> Recipe:
        return dataclasses.replace(recipe, **values)

    def model(**values) -> Recipe:
        return changed(model={**recipe.model, **values})

    height, width = recipe.crop_size
    rows = [("recipe", "as it is", recipe)]
    for factor in (0.5, 1.5, 2):
        size = [round(factor * side) for side in (height, width)]
        if all(side % 32 == 0 for side in size):
            with suppress(ValueError):  # too small for the recipe's flow
                rows.append(("crop_size", f"{size[0]}x{size[1]}", changed(crop_size=size)))
    rows += [("num_subcrops", str(k), changed(num_subcrops=k)) for k in (1, 2, 4, 6, 12) if k != recipe.num_subcrops]
    if recipe.flow.startswith("raft"):
        counts = [n for n in (6, 12, 24, 30) if n != recipe.flow_updates]
        rows += [("flow_updates", str(n), changed(flow_updates=n)) for n in counts]
        rows.append(("flow", "dis", changed(flow="dis", flow_weights=None)))
    blocks = recipe.model_config().num_decoder_blocks
    rows += [("num_decoder_blocks", str(n), model(num_decoder_blocks=n)) for n in (0, 1, 2, 3) if n != blocks]
    rows.append(("dense_stride", "4", model(dense_stride=4)))
    rows.append(("dense_stride", "1", model(dense_stride=1)))
    rows.append(("pooled_weight", "0", model(pooled_weight=0.0)))
    rows.append(("dense_weight", "0, no decoder", model(dense_weight=0.0, num_decoder_blocks=0)))
    return rows


def step_seconds(rows: list[dict[str, float]], flow_beside: bool) -> float:
    """Median seconds of the steps, without the flow if `flow_beside`, that is if the workers of a run compute it beside the step."""
    return statistics.median(row["step"] - (row["flow"] if flow_beside else 0.0) for row in rows)


def cost(recipe: Recipe, steps: int, warmup: int) -> dict[str, float]:
    """Measure one step of `recipe` for a row of the table; without times if `steps` is 0."""
    contender, pairs, times, memory = Contender(OurStep, recipe), recipe.per_device_train_batch_size, {}, None
    if steps:
        contender.ask("run", warmup)
        contender.ask("reset")
        beside = recipe.flow == "dis" and contender.ask("about")["device"].startswith("cuda")
        step = step_seconds(contender.ask("run", steps), flow_beside=beside)
        memory = contender.ask("memory")
        flow = medians(contender.ask("exact", min(3, steps)))["flow"]
        times = {"ms_a_pair": 1000 * step / pairs, "flow_ms": 1000 * flow / pairs}
    flops = contender.ask("flops")  # last, for it runs uncompiled
    memory = memory or contender.ask("memory")
    contender.close()
    return {
        **times,
        "gflops_a_pair": flops["model"] / pairs / 1e9,
        "flow_gflops": flops["flow"] / pairs / 1e9,
        "peak_gib": memory["peak_bytes"] / 2**30,
        "step_gib": (memory["peak_bytes"] - memory["built_bytes"]) / 2**30,
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--only", nargs="+", help="rows that change these, beside the recipe as it is")
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument(
        "--count_only", action="store_true", help="one step a row, without times; AdamW has no moments yet"
    )
    options, flags = parser.parse_known_args()
    steps = 0 if options.count_only else options.steps
    recipe = step_recipe(parser, flags)
    wanted = variants(recipe)
    known = sorted({name for name, _, _ in wanted})
    if options.only and not set(options.only) <= set(known):
        parser.error(f"--only must be among {', '.join(known)}, got {' '.join(options.only)}")
    rows = []
    for name, value, variant in wanted:
        if options.only is None or name in ("recipe", *options.only):
            try:
                rows.append({"changed": name, "to": value, **cost(variant, steps, options.warmup)})
            except RuntimeError as error:
                if not rows and not isinstance(error, TooLarge):  # the recipe itself does not run
                    raise
                print(f"{name} {value}: left out, {error}", flush=True)  # the other rows are still useful
                continue
            figures = [f"{figure:.1f} {key}" for key, figure in rows[-1].items() if isinstance(figure, float)]
            print(f"{name} {value}: {', '.join(figures)}", flush=True)  # at once, like the file: many rows take long
            write_json(options.json, {"rows": rows, "recipe": dataclasses.asdict(recipe)})
    print(
        f"{recipe.per_device_train_batch_size} pairs of {recipe.crop_size[0]}x{recipe.crop_size[1]}, flow {recipe.flow}"
    )
    times = {"ms_a_pair": ".1f", "flow_ms": ".1f"} if steps else {}
    formats = {**times, "gflops_a_pair": ".1f", "flow_gflops": ".1f"}
    print_table(rows, {"changed": "", "to": "", **formats, "peak_gib": ".2f", "step_gib": ".2f"})


if __name__ == "__main__":
    main()
