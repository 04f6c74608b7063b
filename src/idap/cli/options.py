"""The options of the commands: their types and help texts."""

from pathlib import Path
from typing import Annotated

import typer

from idap.cli import completions
from idap.cli.lazy import OUTPUT

GOALS, RUN = "Goals", "The run"
"""Headings in the help."""

Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON document instead of text.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", metavar="", help="Print nothing but errors.", rich_help_panel=OUTPUT)
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        metavar="",
        help="Show how long each part takes, and the versions of the libraries.",
        rich_help_panel=OUTPUT,
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", metavar="", help="Show the traceback of an error.", envvar="IDAP_DEBUG", rich_help_panel=OUTPUT
    ),
]

RecipeFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE",
        help="A TOML file, or a name; idap list recipes lists some.",
        show_default=False,
    ),
]
ModelSpec = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="The model: python:net.py:build, timm:NAME, torchvision:NAME or hf:FOLDER.",
        autocompletion=completions.models,
    ),
]
TaskSpec = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="SPEC",
        help="The task, python:FILE.py:NAME: a Task, or a function that returns one.",
        autocompletion=completions.scripts,
    ),
]
DataPath = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="NAME:PATH",
        help="The data: digits, imagefolder:PATH, csv:PATH, text:PATH, masks:PATH, cifar10:PATH, mnist:PATH, "
        "python:FILE.py:FUNCTION; a path alone replaces the recipe's path.",
        show_default=False,
    ),
]
WeightsPath = Annotated[
    Path | None, typer.Option("--weights", metavar="PATH", help="The weights to load, instead of the recipe's.")
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        "--max-drop",
        metavar="NUMBER",
        help="How much worse the metric may get: 0.01 is a point of accuracy.",
        rich_help_panel=GOALS,
    ),
]
Macs = Annotated[
    str | None,
    typer.Option(
        "--macs", metavar="SHARE", help="Share of the multiply-adds that may stay: 0.5 or 50%.", rich_help_panel=GOALS
    ),
]
Parameters = Annotated[
    str | None,
    typer.Option("--parameters", metavar="SHARE", help="Share of the parameters that may stay.", rich_help_panel=GOALS),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="SHARE", help="Share of the file size that may stay.", rich_help_panel=GOALS),
]
LatencyShare = Annotated[
    str | None,
    typer.Option(
        "--latency", metavar="SHARE", help="Share of the latency, measured here, that may stay.", rich_help_panel=GOALS
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", metavar="PATH", help="New folder for the run; runs/NAME if left out.", rich_help_panel=RUN
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar="",
        help="Go on with the run in --run-dir (or runs/NAME), or begin it; `idap resume RUN` needs no recipe.",
        rich_help_panel=RUN,
    ),
]
TensorBoardDir = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard",
        metavar="PATH",
        help="Log the run for TensorBoard, in a new folder inside this one.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the recipe; may be repeated."),
]
Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A model (python:FILE.py:NAME, idap:NAME, torchvision:NAME, timm:NAME, transformers:TYPE) or a recipe "
        "(FILE.toml).",
        show_default=False,
        autocompletion=completions.models,
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="1,3,32,32",
        help="Shape of an input, batch first; once per positional input. Add :int for token numbers, as in 1,128:int.",
    ),
]
Contracts = Annotated[
    list[str] | None,
    typer.Option(
        "--contract",
        metavar="NAME",
        help="An output whose shape must stay, such as logits; may be repeated. All outputs if left out.",
    ),
]
NoSwap = Annotated[
    bool,
    typer.Option("--no-swap", metavar="", help="Do not cut what would need a module's forward to be rewritten."),
]
WithDivergence = Annotated[
    bool,
    typer.Option(
        "--divergence", metavar="", help="Measure how much each part changes the flow; needs a recipe, or --task."
    ),
]
CriterionName = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        metavar="NAME",
        help="The criterion: relative, innovation, paper, ...; idap list criteria lists all.",
        autocompletion=completions.criteria,
    ),
]
ProfileFile = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the divergence profile as JSON to this file.")
]
WithLatency = Annotated[
    bool,
    typer.Option(
        "--latency",
        metavar="",
        help="Time the layers of each group on this machine at several widths, and find the step of useful widths.",
    ),
]
TableBatch = Annotated[
    int | None, typer.Option("--batch", metavar="SAMPLES", help="Samples in a timed pass. [1]", min=1)
]
Members = Annotated[bool, typer.Option("--members", metavar="", help="List the tensors of each group.")]
Fast = Annotated[bool, typer.Option("--fast", metavar="", help="Train and compress for a shorter time.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all random numbers.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="PATH", help="Folder for the runs; a temporary one if left out.")
]
RunFolders = Annotated[
    list[Path], typer.Argument(metavar="RUN RUN...", help="Two to four run folders.", show_default=False)
]
OneRun = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/NAME.", show_default=False)]
PageFile = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="The page; RUN/report.html if left out.", show_default=False),
]
OpenPage = Annotated[bool, typer.Option("--open", metavar="", help="Open the page in the browser.")]
PdfFile = Annotated[
    Path | None, typer.Option("--pdf", metavar="FILE", help="Print the page as PDF; needs Chromium, Chrome or Edge.")
]
PngFile = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="Save the page as a picture; needs Chromium, Chrome or Edge."),
]
ComparisonFile = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write the comparison as an HTML page.", show_default=False),
]
RunOrModel = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A run folder, or a folder with plan.json.", show_default=False)
]
OriginalSpec = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="The model that was compressed, such as python:net.py:build, or its recipe (FILE.toml); the run's own "
        "recipe if left out.",
        autocompletion=completions.models,
    ),
]
ExportTo = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="FORM",
        help="onnx, pt2 (torch.export), safetensors or transformers.",
        autocompletion=completions.one_of(("onnx", "pt2", "safetensors", "transformers")),
    ),
]
ExportFile = Annotated[
    Path,
    typer.Option("--out", metavar="FILE", help="The file to write; for transformers a folder.", show_default=False),
]
Finalize = Annotated[
    bool, typer.Option("--finalize", metavar="", help="Fold batch norms and remove dropout first; see idap.finalize.")
]
StaticBatch = Annotated[
    bool, typer.Option("--static-batch", metavar="", help="Fix the batch size to that of the example inputs.")
]
Opset = Annotated[
    int | None, typer.Option("--opset", help="Version of the ONNX operators; torch's choice if left out.")
]
Batches = Annotated[
    list[int] | None,
    typer.Option("--batch", metavar="SAMPLES", help="Samples in a pass; may be repeated; 1 if left out."),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="eager, compile (torch.compile) or onnxruntime; may be repeated; eager if left out.",
        autocompletion=completions.one_of(("eager", "compile", "onnxruntime")),
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="COUNT", help="Number of CPU threads.")]
ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", metavar="", help="Lay images out with their channels last.")
]
Repeats = Annotated[int, typer.Option("--repeats", metavar="COUNT", help="Timed passes of each model.", min=2)]
PlanFile = Annotated[
    Path, typer.Argument(metavar="PLAN", help="plan.json, or the folder that holds it.", show_default=False)
]
Checkpoint = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        metavar="PATH",
        help="Checkpoint of the original: a safetensors file or a folder, sharded or not.",
    ),
]
SmallFolder = Annotated[
    Path, typer.Option("--out", metavar="PATH", help="New or empty folder, or the one that a stopped run has left.")
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest file: 5GB, 500MB or a number of bytes.")
]
RunToResume = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        metavar="",
        help="Run the code that the run's recipe names, even if the run was made elsewhere.",
    ),
]
RunOrModelOrNone = Annotated[
    Path | None,
    typer.Argument(metavar="FOLDER", help="A run folder, or a folder with plan.json.", show_default=False),
]
EvaluatedRecipe = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="The recipe that names model and data; the run's own if left out."),
]
EvaluatedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="The original, such as python:net.py:build; with --task it needs no recipe.",
        autocompletion=completions.models,
    ),
]
SplitName = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="NAME",
        help="val (the validation data) or test.",
        autocompletion=completions.one_of(("val", "test")),
    ),
]
OnlyNumbers = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar="", help="Print only the numbers, one per line.", rich_help_panel=OUTPUT),
]
OnlyNames = Annotated[
    bool, typer.Option("--quiet", "-q", metavar="", help="Print only the names, one per line.", rich_help_panel=OUTPUT)
]
ListKind = Annotated[
    str | None,
    typer.Argument(
        metavar="KIND", help="models, data, criteria or recipes.", show_default=False, autocompletion=completions.kinds
    ),
]
ListWords = Annotated[list[str] | None, typer.Argument(metavar="WORD", help="Words to look for.", show_default=False)]
ShellName = Annotated[
    str | None,
    typer.Argument(
        metavar="SHELL",
        help="bash, zsh or fish.",
        show_default=False,
        autocompletion=completions.one_of(("bash", "zsh", "fish")),
    ),
]
