"""
One training step: pairs per second, peak memory, FLOPs, and where the time goes. With --reference, it is compared in the same run with a
plain step that behaves like the released code (benchmarks/reference.py).

    python benchmarks/step.py --config street --reference
    python benchmarks/step.py --config bdd100k_r50 --crop_size 256 512 --bf16 false --flow dis --per_device_train_batch_size 2 --reference
    python benchmarks/step.py --config bdd100k_r50 --flow_weights random --bf16 --torch_compile --reference --json step.json   # on a GPU
    python benchmarks/step.py --config bdd100k_r50 --flow_weights random --bf16 --largest_batch                                # on a GPU
    python benchmarks/step.py --config bdd100k_r50 --flow dis --bf16 --count_memory --reference
    python benchmarks/step.py --config bdd100k_r50 --flow dis --bf16 --count_work --reference   # minutes, 24 GiB

Takes the flags of training/pretrain.py (its flow: dis or RAFT; unflow only without --reference). Frames are synthetic and already on the
device, so that neither the disk nor the decoder is measured (benchmarks/loader.py does that). Both steps include the flow. They take turns
of a few steps, each in its own process, so that a disturbance of the machine affects both and each has its own peak of memory. On a CPU,
"computing" is the processor time of the step, summed over all threads; it is reliable on a busy machine too.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import OurStep, benchmark_parser, medians, print_table, step_recipe, write_json
from benchmarks.contenders import Contender, TooLarge, interleave
from benchmarks.counting import BANDWIDTH, GPUS, HALF_PEAK
from benchmarks.reference import ReferenceStep
from training.recipe import Recipe

PARTS = ("flow", "augmentation", "draws", "forward", "teacher", "backward", "optimizer", "ema")


def speed(contender: Contender, rows: list[dict], pairs: int) -> dict:
    """Compute the figures of one contender from the seconds of its steps."""
    median, memory = medians(rows), contender.ask("memory")
    return {
        "pairs_per_second": pairs / median["wall"],
        "ms_a_step": 1000 * median["wall"],
        "ms_of_computing": 1000 * median["step"],
        "peak_gib": memory["peak_bytes"] / 2**30,
        "step_gib": (memory["peak_bytes"] - memory["built_bytes"]) / 2**30,
    }


def details(contender: Contender, pairs: int, steps: int, kernels: bool) -> dict:
    """Measure where a contender's time goes and its FLOPs, from `steps` further steps without the flow and a few steps in parts."""
    # As in `interleave`, the first step does not count.
    rest = medians(contender.ask("without_flow", steps + 1)[1:])["step"]
    few = min(5, steps)
    parts = medians(contender.ask("exact", few))
    groups = contender.ask("kernels", few) if kernels else None
    flops = contender.ask("flops")  # last, for it runs uncompiled
    found = {
        "model_gflops_a_pair": flops["model"] / pairs / 1e9,
        "flow_gflops_a_pair": flops["flow"] / pairs / 1e9,
        "model_tflops_per_second": flops["model"] / rest / 1e12,
        "parts_ms": {name: 1000 * parts[name] for name in PARTS if name in parts},
    }
    if groups is not None:
        found["kernels_ms"] = {name: 1000 * value for name, value in groups.items()}
        found["convolutions_tflops_per_second"] = flops["model"] / 1e12 / groups["convolutions"]
    return found


def compare(recipe: Recipe, reference: bool, steps: int, warmup: int, kernels: bool = False) -> dict:
    kinds = {"ours": OurStep, **({"reference": ReferenceStep} if reference else {})}
    contenders = {name: Contender(make, recipe) for name, make in kinds.items()}
    if reference:
        try:
            contenders["reference"].ask("run", 1)
        except RuntimeError as error:  # the reference needs five times the memory
            print(f"without the reference: {error}", flush=True)
            contenders.pop("reference")
            reference = False
    about = contenders["ours"].ask("about")
    before = contenders["ours"].ask("ceiling")
    rows = interleave(contenders, steps, warmup)
    ceiling = max(before, contenders["ours"].ask("ceiling"))
    pairs = recipe.per_device_train_batch_size
    result = {name: speed(contenders[name], rows[name], pairs) for name in contenders}
    for name, found in result.items():  # printed at once, in case a later measurement fails
        figures = f"{found['pairs_per_second']:.2f} pairs/s, {found['peak_gib']:.2f} GiB at the peak"
        print(f"{name}: {figures}, median of {steps} steps", flush=True)
    for name, contender in contenders.items():
        result[name] |= details(
            contender, pairs, steps if name == "ours" else min(5, steps), kernels and name == "ours"
        )
    for contender in contenders.values():
        contender.close()
    result |= {**about, "steps": steps, "ceiling_tflops_per_second": ceiling / 1e12}
    # For a float32 step this share would be meaningless.
    peak = HALF_PEAK if recipe.bf16 and has_the_peak(about["device"]) else None
    result["share_of_ceiling"] = result["ours"]["model_tflops_per_second"] * 1e12 / ceiling
    result["share_of_bf16_peak"] = peak and result["ours"]["model_tflops_per_second"] * 1e12 / peak
    if reference:
        ours, theirs = result["ours"], result["reference"]
        result["speed_ratio"] = theirs["ms_a_step"] / ours["ms_a_step"]
        computing = theirs["ms_of_computing"], theirs["ms_of_computing"] - theirs["parts_ms"]["augmentation"]
        result["computing_ratio"] = computing[0] / ours["ms_of_computing"]
        result["computing_ratio_reference_not_augmenting"] = computing[1] / ours["ms_of_computing"]
        result["peak_ratio"] = ours["peak_gib"] / theirs["peak_gib"]
        result["step_memory_ratio"] = ours["step_gib"] / theirs["step_gib"]
    return result


def has_the_peak(gpu: str) -> bool:
    """Whether HALF_PEAK applies to a GPU of this name. It is the peak of the SXM modules; the PCIe and NVL cards are slower."""
    return any(name in gpu for name in GPUS) and not any(card in gpu for card in ("PCIe", "NVL"))


def report(recipe: Recipe, result: dict) -> None:
    height, width = recipe.crop_size
    names = [name for name in ("ours", "reference") if name in result]
    print(
        f"{recipe.per_device_train_batch_size} pairs of {height}x{width}, {recipe.num_subcrops} subcrops of "
        f"{recipe.subcrop_size} a frame, flow {recipe.flow}, ours in {'bf16' if recipe.bf16 else 'fp32'}, "
        f"{result['device']} ({result['threads']} threads), median of {result['steps']} steps"
    )
    form = {
        "pairs_per_second": ".2f",
        "ms_a_step": ".0f",
        "ms_of_computing": ".0f",
        "peak_gib": ".2f",
        "step_gib": ".2f",
        "model_gflops_a_pair": ".1f",
        "flow_gflops_a_pair": ".1f",
    }
    print_table([{"": name, **result[name]} for name in names], {"": "", **form})
    print()
    parts = [part for part in PARTS if any(part in result[name]["parts_ms"] for name in names)]
    print_table(
        [{"ms of": part, **{name: result[name]["parts_ms"].get(part) for name in names}} for part in parts],
        {"ms of": "", **dict.fromkeys(names, ".1f")},
    )
    print()
    print(
        f"ours does {result['ours']['model_tflops_per_second']:.3f} TFLOP/s outside the flow: "
        f"{100 * result['share_of_ceiling']:.0f} % of the {result['ceiling_tflops_per_second']:.3f} measured on this device"
        + (f", {100 * result['share_of_bf16_peak']:.0f} % of its bf16 peak" if result["share_of_bf16_peak"] else "")
        + (" (what gradient_checkpointing computes again counts too)" if recipe.gradient_checkpointing else "")
    )
    if "kernels_ms" in result["ours"]:
        kernels, rate = result["ours"]["kernels_ms"], result["ours"]["convolutions_tflops_per_second"]
        print("of ours, flow left out: " + ", ".join(f"{name} {took:.1f} ms" for name, took in kernels.items()))
        share = 100 * rate / result["ceiling_tflops_per_second"]
        print(
            f"its convolutions alone do {rate:.3f} TFLOP/s, {share:.0f} % of the ceiling: more is not to be had were all the rest free"
        )
    if "reference" in result:
        print(
            f"ours is {result['speed_ratio']:.2f} times as fast; by time of computing {result['computing_ratio']:.2f} times, and "
            f"{result['computing_ratio_reference_not_augmenting']:.2f} were the reference's augmentation free; peak memory "
            f"{result['peak_ratio']:.2f} times, above the built model {result['step_memory_ratio']:.2f} times"
        )


def largest_batch(recipe: Recipe) -> int:
    """Find the most pairs per step that run, by doubling and then bisection. Each try runs in its own process."""
    works, fails = 0, None
    while fails is None or fails - works > 1:
        pairs = max(1, 2 * works) if fails is None else (works + fails) // 2
        contender = Contender(OurStep, dataclasses.replace(recipe, per_device_train_batch_size=pairs))
        try:
            contender.ask("run", 2)
            contender.close()
            works = pairs
        except RuntimeError as error:
            if not works and not isinstance(error, TooLarge):  # the size is not the cause
                raise
            print(f"{pairs} pairs: {error}", flush=True)
            fails = pairs
        print(f"{pairs} pairs: {'runs' if works == pairs else 'does not run'}", flush=True)
    return works


def of_one_and_two_pairs(recipe: Recipe, reference: bool, what: str) -> Iterator[tuple[str, list]]:
    """Yield each contender's name and its answers to the request `what`, for a step of one pair and of two; ours first."""
    for name, make in {"ours": OurStep, **({"reference": ReferenceStep} if reference else {})}.items():
        counts = []
        for pairs in (1, 2):
            contender = Contender(make, dataclasses.replace(recipe, per_device_train_batch_size=pairs))
            contender.ask("run", 1)  # so that the optimizer has its moments
            counts.append(contender.ask(what))
            contender.close()
        yield name, counts


def count_memory(recipe: Recipe, reference: bool) -> dict:
    """
    Count the GiB of a step's tensors, for our step and the reference's, and print and return them.

    `fixed` is the memory of the model, the optimizer and all else that does not grow with the batch. `pair` is that of one more pair, from
    a step of one pair and a step of two. For each GPU, the result also holds the most pairs that fit.
    """
    result = {}
    for name, counts in of_one_and_two_pairs(recipe, reference, "count"):
        pair = counts[1]["peak"] - counts[0]["peak"]
        found = {"fixed": (counts[0]["resident"] + counts[0]["peak"] - pair) / 2**30, "pair": pair / 2**30}
        fits = {gpu: max(0, int((gib - found["fixed"]) / found["pair"])) for gpu, gib in GPUS.items()}
        result[name] = {**found, **fits}
    print("GiB of the step's tensors, without the libraries' scratch memory; the most pairs that a GPU holds by them")
    columns = {"": "", "fixed": ".2f", "pair": ".2f", **dict.fromkeys(GPUS, "d")}
    print_table([{"": name, **found} for name, found in result.items()], columns)
    return result


def count_work(recipe: Recipe, reference: bool) -> dict:
    """
    Count what a step's operations move and multiply, and derive lower bounds of its time on GPUs from their data sheets.

    `pair` is the work of each pair, and `step` the work that does not depend on the number of pairs. One bound assumes a kernel for each
    operation. Another counts only the products, as if all the rest were fused with them.
    """
    result, pairs = {}, recipe.per_device_train_batch_size
    for name, (one, two) in of_one_and_two_pairs(recipe, reference, "work"):
        rows = []
        for part, kind in [(name, kind) for name in ("flow", "model") for kind in two[name]]:
            a, b = one[part].get(kind, {}), two[part][kind]
            pair = {key: b[key] - a.get(key, 0) for key in b}
            step = {key: a.get(key, 0) - pair[key] for key in b}
            rows.append({"part": part, "kind": kind, "operations": b["operations"], "pair": pair, "step": step})
        bounds = {}
        for gpu in BANDWIDTH:
            seconds = [(row, row["pair"][f"seconds_{gpu}"] + row["step"][f"seconds_{gpu}"] / pairs) for row in rows]
            model = sum(took for row, took in seconds if row["part"] == "model")
            flops = sum(row["pair"]["flops"] for row in rows if row["part"] == "model")
            bounds[gpu] = {
                "ms_a_pair": 1000 * sum(took for _, took in seconds),
                "model_ms_a_pair": 1000 * model,
                "products_ms_a_pair": 1000 * sum(took for row, took in seconds if row["kind"] == "products"),
                "share_of_bf16_peak": flops / model / HALF_PEAK,
            }
        result[name] = {"kinds": rows, "bounds": bounds}
        print(f"{name}: of a pair, and in the last column of a step of {pairs}, whatever its pairs")
        shown = [
            {"part": row["part"], "": row["kind"], "operations a step": row["operations"],
             "GB": row["pair"]["bytes"] / 1e9, "TFLOP": row["pair"]["flops"] / 1e12,
             **{f"ms {gpu}": 1000 * row["pair"][f"seconds_{gpu}"] for gpu in BANDWIDTH}, "GB a step": row["step"]["bytes"] / 1e9}
            for row in rows
        ]  # fmt: skip
        print_table(shown, {"part": "", "": "", "operations a step": "d", **dict.fromkeys(list(shown[0])[3:], ".2f")})
        for gpu, bound in bounds.items():
            print(
                f"{gpu}, at {pairs} pairs a step: at least {bound['ms_a_pair']:.1f} ms a pair, {bound['model_ms_a_pair']:.1f} without the flow, "
                f"which is {100 * bound['share_of_bf16_peak']:.0f} % of its bf16 peak; the products alone {bound['products_ms_a_pair']:.1f} ms"
            )
        print(flush=True)
    return result


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--reference", action="store_true", help="run the reference beside it")
    parser.add_argument("--largest_batch", action="store_true", help="only find the largest batch that fits this GPU")
    parser.add_argument("--count_memory", action="store_true", help="only count the memory of a step's tensors")
    parser.add_argument(
        "--count_work", action="store_true", help="only count what a step moves and multiplies, and its bounds on GPUs"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="also where the time goes, by kind of kernel, with torch.profiler"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that count")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    options, flags = parser.parse_known_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    recipe = step_recipe(parser, flags, options.reference)
    if options.largest_batch:
        result = {"largest_batch": largest_batch(recipe)}
    elif options.count_memory:
        result = count_memory(recipe, options.reference)
    elif options.count_work:
        result = count_work(recipe, options.reference)
    else:
        result = compare(recipe, options.reference, options.steps, options.warmup, options.kernels)
        report(recipe, result)
    write_json(options.json, {**result, "recipe": dataclasses.asdict(recipe)})


if __name__ == "__main__":
    main()
