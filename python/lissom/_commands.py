"""The commands of ``lissom``: read arguments, call the library, show what it says. Needs typer and rich."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import nn

from . import __version__, io
from ._noise import NOISY_CORES, ForeignCores
from ._sentences import SENTENCES
from ._terminal import bar, console, layer_table, microseconds, progress, size, table
from .compress import NAMED_RECIPES, Report, compress_, load_recipe
from .compress.inputs import as_call

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make trained PyTorch models smaller and measurably faster.\n\n"
    "Exit codes: 0 success, 1 a bad input or a failure (one line on stderr), 2 a wrong command line.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RecipeName = Annotated[str, typer.Option(help=f"A name ({', '.join(NAMED_RECIPES)}) or a YAML or JSON file.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"lissom {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _only_json(as_json: bool) -> Iterator[dict[str, Any]]:
    """Yield a dict to fill, printed at the end; what libraries print meanwhile goes to stderr."""
    result: dict[str, Any] = {}
    if not as_json:
        yield result
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield result
    print(json.dumps(result, indent=1, allow_nan=False))


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Hugging Face folder or id. [all-MiniLM-L6-v2]")] = None,
    recipe: RecipeName = "int8",
    out: Annotated[Path, typer.Option(help="Folder to save to; an earlier demo there is replaced.")] = Path(
        "lissom-demo"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Folder with banking77/test.csv.gz, for more real text.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, and no 32×128.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress a real pretrained model and show what that gains and costs."""
    from . import demo as steps

    with _only_json(as_json) as found:
        with progress("lissom demo", not as_json) as update:
            found |= steps.run(
                model=model, recipe=load_recipe(recipe), out=out, data=data, quick=quick, progress=update
            )
        if not as_json:
            _show_demo(found)


def _show_demo(found: dict[str, Any]) -> None:
    screen = console()
    title = f"{found['model']} from {found['source']}: {found['parameters'] / 1e6:.1f} M parameters"
    kernels = f"lissom {found['lissom']} ({found['isa']}), torch {found['torch']}, {found['threads']} threads"
    screen.print(f"[bold]{escape(title)}[/]\n{kernels}\n")
    report = found["report"]
    screen.print(layer_table("Layers", report["layers"]))
    for note in report["notes"]:
        screen.print(f"note: {escape(note)}")
    rows = [
        (
            f"{point['batch']}×{point['length']}",
            *(f"{point[key]:.3g} ms" for key in ("fp32_ms", "torch_int8_ms", "lissom_ms")),
            f"[green]{point['speedup_fp32']:.2f}×[/]",
            f"{point['speedup_torch_int8']:.2f}×",
        )
        for point in found["latency"]
    ]
    columns = ("batch×length", "fp32", "torch int8", "lissom", "lissom vs fp32", "lissom vs torch int8")
    screen.print()
    screen.print(table("Latency (medians; ratios are medians of interleaved rounds)", columns, rows))
    sizes, memory, cosine, texts = (found[key] for key in ("size", "memory", "cosine", "texts"))
    screen.print()
    screen.print(table("Totals", ("", "before", "after", ""), _totals(found, sizes, memory), left=(0, 3)))
    screen.print()
    for name in ("lissom", "torch int8"):
        screen.print(
            f"cosine to fp32, {texts['count']} texts ({texts['from']}): {name:<10} "
            f"mean {cosine[name]['mean']:.5f}, least {cosine[name]['min']:.5f}"
        )
    screen.print(
        f"\nSaved to [bold]{escape(found['folder'])}[/], reloaded in {found['load_s']:.2f} s with "
        f"bit-identical embeddings.\nUse it: [bold]model = lissom.load({escape(repr(found['folder']))})[/]"
    )


def _totals(found: dict[str, Any], sizes: dict[str, int], memory: dict[str, int]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            "weights on disk",
            size(sizes["dense_bytes"]),
            size(sizes["lissom_bytes"]),
            f"{100 * sizes['lissom_bytes'] / sizes['dense_bytes']:.1f} %",
        ),
        (
            "weights in memory",
            size(memory["dense_bytes"]),
            size(memory["lissom_bytes"]),
            f"{100 * memory['lissom_bytes'] / memory['dense_bytes']:.1f} %, packed copies included",
        ),
        ("conversion", "", f"{found['conversion_s']:.2f} s", "measuring every layer included"),
    ]
    extra = found["conversion_extra_bytes"]
    if extra is not None:
        share = extra / memory["dense_bytes"]
        rows.append(("conversion's peak memory", "", f"+{size(extra)}", f"{share:.2f}× the model on top"))
    return rows


@app.command()
def compress(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder or id, or package.module:factory (needs --weights).")
    ],
    out: Annotated[Path, typer.Option(help="Folder to save to: new, or an earlier save with --overwrite.")],
    recipe: RecipeName = "int8",
    weights: Annotated[Path | None, typer.Option(help="safetensors file for a factory's model.")] = None,
    example: Annotated[
        str | None, typer.Option(help="package.module:function that returns example inputs for the model.")
    ] = None,
    example_shape: Annotated[
        str | None, typer.Option(help="Instead: the shape of one random float input, such as 8x3x32x32.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of example text (Hugging Face).")] = 8,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens in each row of example text (Hugging Face).")
    ] = 128,
    strict: Annotated[bool, typer.Option("--strict", help="A layer that stays dense is an error.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier save.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL and save it as a folder that lissom.load reads.

    Each layer is timed on example inputs and kept only where it gets faster. A Hugging Face model with a
    tokenizer is given real English text; for others say --example or --example-shape, or nothing is timed.
    """
    chosen = load_recipe(recipe)
    io.check_target(out.resolve(), overwrite)
    if example is not None and example_shape is not None:
        raise ValueError("--example and --example-shape are both given; give one of them")
    with _only_json(as_json) as result, contextlib.ExitStack() as stack:
        loaded = _load_model(model, weights, batch, length)
        inputs = loaded.inputs
        if example is not None:
            inputs = _call(example, "--example")
            as_call(inputs, f"--example {example}")
        elif example_shape is not None:
            inputs = _random_input(example_shape, loaded.model)
        with progress("lissom compress", not as_json) as update:
            report = compress_(
                loaded.model,
                chosen,
                example_inputs=inputs,
                calibration=loaded.calibration if inputs is loaded.inputs else None,
                strict=strict,
                progress=update,
            )
        files: list[Path] = []
        if loaded.tokenizer is not None:
            from .integrations import transformers as hf

            files = hf.tokenizer_files(
                loaded.tokenizer, Path(stack.enter_context(tempfile.TemporaryDirectory()))
            )
        folder = io.save(loaded.model, out, overwrite=overwrite, extra_files=files)
        result |= {"folder": str(folder), "report": report.to_dict()}
        if not as_json:
            _show_report(report, folder)


def _show_report(report: Report, folder: Path) -> None:
    screen = console()
    data = report.to_dict()
    screen.print(layer_table("Layers", data["layers"]))
    screen.print()
    for line in str(Report.from_dict({**data, "layers": []})).splitlines()[3:]:
        screen.print(escape(line))
    screen.print(f"\nSaved to [bold]{escape(str(folder))}[/]")


class _Loaded:
    """A model to compress and, for Hugging Face ones, real text to compress it with."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tokenizer: Any = None
        self.inputs: Any = None
        self.calibration: list[Any] | None = None


def _load_model(name: str, weights: Path | None, batch: int, length: int) -> _Loaded:
    if not Path(name).exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        return _Loaded(_factory_model(name, weights))
    if weights is not None:
        raise ValueError(f"--weights goes with package.module:factory, but MODEL is {name!r}")
    if Path(name).is_file():
        raise ValueError(
            f"MODEL {name!r} is a file; give a Hugging Face folder or id, or package.module:factory"
        )
    if (Path(name) / io.MANIFEST).is_file():
        raise ValueError(f"MODEL {name!r} is compressed already (see: lissom inspect {name})")
    from .integrations import transformers as hf

    loaded = _Loaded(hf.load_pretrained(name))
    loaded.tokenizer = hf.load_tokenizer(name)
    if loaded.tokenizer is not None:
        limit = int(getattr(loaded.model.config, "max_position_embeddings", length))
        loaded.inputs = hf.text_inputs(loaded.tokenizer, SENTENCES, batch, min(length, limit))
        step = len(SENTENCES) // 4
        loaded.calibration = [
            hf.text_inputs(loaded.tokenizer, SENTENCES[i : i + step], batch, min(length, limit))
            for i in range(0, len(SENTENCES), step)
        ]
    return loaded


def _factory_model(name: str, weights: Path | None) -> nn.Module:
    if weights is None:
        raise ValueError(
            f"MODEL {name!r} is a factory, whose weights are random; give --weights FILE.safetensors"
        )
    if weights.suffix != ".safetensors":
        raise ValueError(
            f"--weights {weights}: only .safetensors is read (others need pickle, which runs code)"
        )
    if not weights.is_file():
        raise FileNotFoundError(f"--weights {weights}: no such file")
    model = _call(name, "MODEL")
    if not isinstance(model, nn.Module):
        raise TypeError(f"MODEL {name!r} returned a {type(model).__name__}; it must return a torch.nn.Module")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"--weights {weights}: {error}") from error
    return model.eval()


def _call(name: str, option: str) -> Any:
    """Import ``package.module:function``, from the current folder too, and call it."""
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"{option} {name!r} is not package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {name!r} cannot be imported: {error}") from error
    return target()


def _random_input(text: str, model: nn.Module) -> torch.Tensor:
    if not re.fullmatch(r"[1-9]\d*([x×][1-9]\d*)*", text):
        raise ValueError(f"--example-shape {text!r} is not a shape such as 8x128")
    shape = [int(part) for part in re.split("[x×]", text)]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that lissom saved.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a saved folder and show what it holds, without building the model."""
    summary = io.inspect(folder)
    if as_json:
        print(json.dumps(summary, indent=1, allow_nan=False))
        return
    screen = console()
    build, written = summary["build"], summary["written_by"]
    rows = [
        ("folder", summary["folder"]),
        ("model", f"{build.get('class', 'one layer')} ({build['kind']})"),
        ("parameters", f"{summary['parameters'] / 1e6:.2f} M"),
        ("files", ", ".join(f"{name} {size(entry['bytes'])}" for name, entry in summary["files"].items())),
        ("written by", ", ".join(f"{name} {value}" for name, value in written.items())),
        ("recipe", "none" if summary["recipe"] is None else json.dumps(summary["recipe"])),
        ("tied tensors", "; ".join(" = ".join(names) for names in summary["tied"]) or "none"),
        ("golden check", "yes" if summary["golden"] else "no (saved without example inputs)"),
    ]
    screen.print(table("Saved model, checked", ("", ""), [(a, escape(str(b))) for a, b in rows], left=(0, 1)))
    screen.print()
    report = summary["report"]
    if report is not None:
        screen.print(layer_table("Layers", report["layers"]))
        return
    layers = [
        (escape(name), entry["class"], escape(json.dumps(entry["args"])), size(entry["bytes"]))
        for name, entry in summary["layers"].items()
    ]
    screen.print(table("Layers", ("layer", "class", "arguments", "size"), layers, left=(0, 1, 2)))


bench_app = typer.Typer(invoke_without_command=True, subcommand_metavar="[sparse [OPTIONS]]")
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench(
    context: typer.Context,
    op: Annotated[
        str,
        typer.Option(
            help="int8_linear, int8_embedding, int4_linear, int4_embedding or block_sparse_linear (80 % of "
            "8x1 blocks left out)."
        ),
    ] = "int8_linear",
    shape: Annotated[
        list[str] | None,
        typer.Option(help="KxN of the layer (rows x width of an embedding); repeat for more."),
    ] = None,
    m: Annotated[str, typer.Option("--m", help="Rows of the input, such as 1,8,32.")] = "1,8,32,128",
    threads: Annotated[str | None, typer.Option(help="Numbers of threads, such as 1,2. [torch's]")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each comparison.")] = 0.3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time one op against torch on this machine, interleaved; the results are checked first.

    bench sparse: how the speed of block-sparse layers depends on the sparsity.
    """
    if context.invoked_subcommand is not None:
        for name in context.params:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise ValueError(f"bench: the options of {context.invoked_subcommand} come after its name")
        return
    from . import microbench

    if op not in microbench.OPS:
        raise ValueError(f"--op {op!r} is unknown; use one of {', '.join(microbench.OPS)}")
    shapes = [microbench.parse_shape(text) for text in shape or microbench.OPS[op].shapes]
    rows = microbench.parse_numbers(m, "--m")
    counts = [torch.get_num_threads()] if threads is None else microbench.parse_numbers(threads, "--threads")
    with _only_json(as_json) as result:
        started, foreign = time.perf_counter(), ForeignCores()
        with bar("lissom bench", not as_json) as update:
            points = list(microbench.run(op, shapes, rows, counts, budget_s=seconds, progress=update))
        result |= {"points": points, "seconds": time.perf_counter() - started, **_noise(foreign)}
        if not as_json:
            console().print(_bench_table(points))
            _warn_of_noise(result)


def _noise(foreign: ForeignCores) -> dict[str, Any]:
    cores = foreign.mean()
    return {"foreign_cores": cores, "noisy": cores is not None and cores > NOISY_CORES}


def _warn_of_noise(result: dict[str, Any]) -> None:
    if result["noisy"]:
        console().print(
            f"[yellow]other processes kept {result['foreign_cores']:.1f} cores busy meanwhile: "
            "do not rely on these figures[/]"
        )


@bench_app.command("sparse")
def bench_sparse(
    shape: Annotated[list[str] | None, typer.Option(help="KxN of the layer; repeat for more.")] = None,
    m: Annotated[str, typer.Option("--m", help="Rows of the input, such as 1,32.")] = "1,32,128",
    threads: Annotated[str | None, typer.Option(help="Numbers of threads, such as 1,2. [torch's]")] = None,
    sparsity: Annotated[
        str, typer.Option(help="Shares of the weights left out.")
    ] = "0.3,0.5,0.7,0.8,0.9,0.95",
    block: Annotated[
        list[str] | None,
        typer.Option(help="Outputs x inputs of a block, such as 8x1; repeat for more. [the fast ones]"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Stored values: float32, bfloat16, float16 or int8.")
    ] = "float32",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each comparison.")] = 0.15,
    out: Annotated[
        Path | None, typer.Option(help="File for a plot: .png or .svg (needs matplotlib).")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Speed-up of block-sparse layers over a dense one against the sparsity, and where it passes 1.

    Random blocks, against nn.Linear in float32, interleaved; the results are checked first.
    """
    from . import microbench, sparse_curve

    if dtype not in sparse_curve.DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown; use one of {', '.join(sparse_curve.DTYPES)}")
    shapes = [microbench.parse_shape(text) for text in shape or ("1024x4096",)]
    rows = microbench.parse_numbers(m, "--m")
    counts = [torch.get_num_threads()] if threads is None else microbench.parse_numbers(threads, "--threads")
    sparsities = sparse_curve.parse_sparsities(sparsity)
    blocks = [sparse_curve.parse_block(text) for text in block or ()] or sparse_curve.FAST_BLOCK_SHAPES
    if out is not None:
        sparse_curve.check_plot(out)
    with _only_json(as_json) as result:
        started, foreign = time.perf_counter(), ForeignCores()
        with bar("lissom bench sparse", not as_json) as update:
            points = list(
                sparse_curve.measure(
                    shapes,
                    rows,
                    counts,
                    sparsities=sparsities,
                    block_shapes=blocks,
                    dtype=dtype,
                    budget_s=seconds,
                    progress=update,
                )
            )
        found = sparse_curve.crossovers(points)
        result |= {"points": points, "crossovers": found, "seconds": time.perf_counter() - started}
        result |= _noise(foreign)
        if not as_json:
            for title, columns, lines in sparse_curve.tables(points, found):
                console().print(table(title, columns, lines))
                console().print()
            _warn_of_noise(result)
        if out is not None:
            sparse_curve.draw(points, out)
            result["plot"] = str(out)
            if not as_json:
                console().print(f"Plot: [bold]{escape(str(out))}[/]")


def _bench_table(points: list[dict[str, Any]]) -> Any:
    def optional(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    rows = [
        (
            f"{p['shape'][0]}×{p['shape'][1]}",
            str(p["m"]),
            str(p["threads"]),
            microseconds(p["fp32_us"]),
            "" if p["torch_int8_us"] is None else microseconds(p["torch_int8_us"]),
            microseconds(p["lissom_us"]),
            f"{p['speedup_fp32']:.2f}×",
            optional(p["speedup_torch_int8"], "{:.2f}×"),
            f"{p['gops']:.1f}",
            f"{p['sqnr_db']:.1f} dB",
        )
        for p in points
    ]
    columns = (
        "K×N",
        "M",
        "threads",
        "fp32",
        "torch int8",
        "lissom",
        "vs fp32",
        "vs torch int8",
        "GOP/s",
        "SQNR",
    )
    return table(f"{points[0]['op']} (medians; ratios are medians of interleaved rounds)", columns, rows)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show what this machine has, which kernels are used, and why each other one is not."""
    from .doctor import diagnose

    found = diagnose()
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return
    screen = console()
    native, cpu, openmp = found["native"], found["cpu"], found["openmp"]
    isas = ", ".join(f"{name} {'yes' if runs else 'no'}" for name, runs in native.get("isas", {}).items())
    extras = (
        f"{extra}: {', '.join(f'{n} {v}' if v else f'{n} missing' for n, v in names.items())}"
        for extra, names in found["extras"].items()
    )
    gpus = (
        f"{gpu['name']}, compute capability {gpu['capability']}, {size(gpu['memory_bytes'])}"
        for gpu in found["gpus"]
    )
    rows = [
        ("versions", f"lissom {found['lissom']}, python {found['python']}, torch {found['torch']}"),
        ("platform", found["platform"]),
        ("CPU", f"{cpu['name']} ({cpu['machine']}); {' '.join(cpu['features']) or 'no SIMD features known'}"),
        ("CUDA", found["cuda"] or "none"),
        ("GPUs", "\n".join(gpus) or "none"),
        ("GPU kernels", found["triton"].get("detail") or found["triton"]["reason"]),
        ("threads", f"torch {found['threads']['torch']}, cores {found['threads']['cores']}"),
        ("kernels", f"{native['isa']} (this CPU runs: {isas})" if native["available"] else native["reason"]),
        ("OpenMP", "unknown (no /proc)" if openmp is None else ", ".join(openmp) or "none"),
        ("extras", "\n".join(extras)),
        ("environment", ", ".join(f"{k}={v}" for k, v in found["environment"].items()) or "nothing set"),
    ]
    screen.print(table("This machine", ("", ""), [(a, escape(b)) for a, b in rows], left=(0, 1)))
    colors = {"used": "green", "available": "dim", "unavailable": "yellow"}
    backends = [
        (b["op"], b["device"], b["backend"], f"[{colors[b['status']]}]{b['status']}[/]", escape(b["detail"]))
        for b in found["backends"]
    ]
    columns = ("op", "device", "backend", "status", "detail")
    screen.print()
    screen.print(table("Backends, best first", columns, backends, left=(0, 1, 2, 3, 4)))
    screen.print()
    for problem in found["problems"]:
        screen.print(f"[bold red]problem:[/] {escape(problem)}")
    if not found["problems"]:
        screen.print("[green]no problems found[/]")
