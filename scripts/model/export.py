"""Takes a trained model elsewhere: a timm folder, a torch.export program, or ONNX.

python scripts/model/export.py --checkpoint outputs/NAME [OTHER ...] --format timm|torch_export|onnx [--output FOLDER]

Every format is read back by its own means and compared with the checkpoint's model; the largest difference of the
logits is printed, and one that is no rounding ends the script with status 1. Beside the model lies config.json: classes
and preprocessing, as timm writes it. torch.export programs and ONNX files take any batch size and the image size of the
training; they run without this package. Of several checkpoints of one model the mean of the weights is exported.
"""

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from contextual_cnn.errors import UserError, run_script
from contextual_cnn.models import ContextualModel, summarize
from contextual_cnn.ops.standard_operators import decompositions
from contextual_cnn.trained import Trained, describe_classes, load_model

FILES = {"timm": "model.safetensors", "torch_export": "model.pt2", "onnx": "model.onnx"}
BATCHES = (1, 3)  # of the comparison
TOLERANCE = 1e-2  # of logits; a class at the edge of a shortlist that rounding moves over it changes them by so much


def main() -> None:
    arguments = parse_arguments()
    given = load_mean(arguments.checkpoint, arguments.weights)
    folder = arguments.output or given.folder / "export" / arguments.format
    export = {"timm": export_timm, "torch_export": export_torch, "onnx": export_onnx}[arguments.format]
    print(f"{given.settings.name}, {given.weights} weights of {given.path}: {summarize(given.model)}")
    try:
        write_config(given, folder)
        again = export(given, folder)
    except OSError as error:
        raise UserError(f"the model cannot be written to {folder}: {error}", "--output FOLDER") from error
    file = folder / FILES[arguments.format]
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    differences = largest_differences(given, again)
    print(f"largest difference of the logits: {max(differences):.2g} (batches of {BATCHES[0]} and {BATCHES[1]} images)")
    sys.exit(0 if max(differences) <= TOLERANCE else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], epilog=__doc__.rpartition("\n\n")[2])
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="RUN",
        help="a run folder (outputs/NAME) or a .pt file; the mean of several",
    )
    parser.add_argument("--format", required=True, choices=list(FILES))
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: export/FORMAT in the run folder")
    parser.add_argument(
        "--weights",
        choices=["auto", "raw", "ema"],
        default="auto",
        help="auto: those that made the checkpoint the best",
    )
    return parser.parse_args()


def load_mean(checkpoints: list[str], weights: str) -> Trained:
    """The first, with the mean of all weights; numbers that count, as batch norm's, are those of the first.

    Raises:
        UserError: they are not of one model with the same classes.
    """
    first, *others = (load_model(checkpoint, weights) for checkpoint in checkpoints)
    for other in others:
        if (other.settings, other.classes) != (first.settings, first.classes):
            raise UserError(f"{other.path} is of another model than {first.path}", "--checkpoint RUN of the same model")
    states = [given.model.state_dict() for given in (first, *others)]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }
    if others:
        print(f"the mean of {len(states)} checkpoints")
    first.model.load_state_dict(mean)
    return first


def write_config(given: Trained, folder: Path) -> None:
    """config.json, as timm has it."""
    folder.mkdir(parents=True, exist_ok=True)
    # A contextual model without a classifier must know how many classes its context has
    context = {"context_classes": len(given.classes)} if isinstance(given.model, ContextualModel) else {}
    save_config_for_hf(
        given.model,
        folder / "config.json",
        model_config={"label_names": list(given.classes), "label_descriptions": describe_classes(given.classes)},
        model_args=context,
        data_config=given.transform,
    )


def export_timm(given: Trained, folder: Path):
    save_file(given.model.state_dict(), folder / FILES["timm"])
    config = json.loads((folder / "config.json").read_text())
    options = {"num_classes": config["num_classes"], **config.get("model_args", {})}
    checkpoint = folder / FILES["timm"]
    print(f"python: import contextual_cnn.models; timm.create_model('local-dir:{folder}', pretrained=True)")
    return timm.create_model(config["architecture"], checkpoint_path=checkpoint, **options).eval()


def export_torch(given: Trained, folder: Path):
    torch.export.save(program(given), folder / FILES["torch_export"])
    return torch.export.load(folder / FILES["torch_export"]).module()


def export_onnx(given: Trained, folder: Path):
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError(f"ONNX needs a package that is not there: {error}", "pip install -e '.[export]'") from error
    file = folder / FILES["onnx"]
    onnx = torch.onnx.export(
        program(given), input_names=["images"], output_names=["logits"], external_data=False, verbose=False
    )
    onnx.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def program(given: Trained) -> torch.export.ExportedProgram:
    """The model as a graph of standard operators, for any number of images."""
    if given.settings.convolution == "weight_offsets":
        raise UserError(
            "convolution=weight_offsets is a grouped convolution of batch x channels groups, which a program for any "
            "batch size cannot have",
            "--format timm",
        )
    images = (example(given, 2),)
    exported = torch.export.export(given.model, images, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    return exported.run_decompositions(decompositions())


def example(given: Trained, batch: int) -> Tensor:
    return torch.randn(batch, *given.transform["input_size"], generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def largest_differences(given: Trained, again: nn.Module) -> list[float]:
    """The largest difference of each batch; -inf, a dropped class, equals itself."""
    pairs = [(given.model(x), again(x)) for x in (example(given, batch) for batch in BATCHES)]
    return [torch.where(ours == theirs, 0, (ours - theirs).abs()).max().item() for ours, theirs in pairs]


if __name__ == "__main__":
    run_script(main)
