"""The data set, the student and the run, as arguments of the command line."""

from dataclasses import dataclass, field
from pathlib import Path

from ..data import parse_image_size
from ..data.detection_stream import BUFFER
from ..data.faults import SAMPLE


@dataclass
class DataArguments:
    """The images, and their labels."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder (COCO, KITTI, YOLO, Pascal VOC, `datasets` rows, imagefolder), or shapes, "
            "generated images. Required."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a data set on the Hub that has several. Default: its own."}
    )
    train_annotations_file: str | None = field(
        default=None,
        metadata={
            "help": "COCO JSON file of the training images, which lie in the folder --dataset_name; with "
            "--eval_annotations_file. Default: found by the layout."
        },
    )
    eval_annotations_file: str | None = field(
        default=None, metadata={"help": "The same of the evaluation images. Default: found by the layout."}
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split to train on. Default: the first of train, train2017, training."}
    )
    dataset_eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: the first of validation, val, valid, val2017, dev, test."},
    )
    unlabeled_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Further training images whose labels are unknown: a folder of images, or like --dataset_name. "
            "The teacher's stored answers teach on them (--teacher_answers). Default: none."
        },
    )
    labeled_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training images that keep their labels; the others become unlabelled, and are left "
            "out of the control. The choice is the same for every --seed. Default: all keep them."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training images of a Hub id, or of Parquet, Arrow or WebDataset files, while training, "
            "in endless passes, instead of preparing the data set first; needs --max_steps. Default: false."
        },
    )
    shuffle_buffer_size: int = field(
        default=BUFFER,
        metadata={
            "help": "With --streaming, number of rows that each process (or worker of --dataloader_num_workers) holds "
            f"in memory, undecoded, and draws the next one from. Default: {BUFFER}."
        },
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "With --streaming, the class names of a data set whose categories are no `ClassLabel`: all names "
            "that occur, or those of the numbers 0, 1, ... Default: those of the `ClassLabel`."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Maximum number of images to train on. Default: all."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Maximum number of images to evaluate on. Default: all."}
    )
    skip_unreadable_images: bool = field(
        default=False,
        metadata={"help": "Drop and count images that are unreadable or missing instead of stopping. Default: false."},
    )
    check_images: str = field(
        default="sample",
        metadata={
            "help": "Images that are read before the run, so that it does not stop at one that is unreadable or has "
            f"another size: all, sample ({SAMPLE} of each split) or none. Default: sample."
        },
    )
    max_image_pixels: int | None = field(
        default=None,
        metadata={
            "help": "Largest image that is read, in pixels, for scans and satellite images. Default: Pillow's limit, "
            "179 million."
        },
    )

    @property
    def annotations(self) -> dict[str, Path] | None:
        """The COCO JSON files by split, if they are given."""
        files = {"train": self.train_annotations_file, "val": self.eval_annotations_file}
        return {name: Path(file).expanduser() for name, file in files.items() if file is not None} or None

    def __post_init__(self) -> None:
        if (self.train_annotations_file is None) != (self.eval_annotations_file is None):
            raise ValueError("Give both --train_annotations_file and --eval_annotations_file, or neither.")
        if self.labeled_fraction is not None and not 0 < self.labeled_fraction < 1:
            raise ValueError(f"--labeled_fraction must be between 0 and 1, got {self.labeled_fraction}.")
        if self.check_images not in ("all", "sample", "none"):
            raise ValueError(f"--check_images must be all, sample or none, got {self.check_images!r}.")


@dataclass
class StudentArguments:
    """The student, and the size of its images."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the student."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the student on the Hub. Default: main."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Config of a student to train from scratch: Hub id, folder or JSON file."}
    )
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "Safetensors file of a classifier, with weights for the backbone of --config_name. BatchNorm of a "
            "Faster R-CNN is then frozen, unless its config has frozen_batch_norm false."
        },
    )
    init_from_teacher: bool = field(
        default=False,
        metadata={
            "help": "Initialise the student of --config_name (and of the control) from the teacher's matching "
            "weights. Default: false."
        },
    )
    image_size: str | None = field(
        default=None,
        metadata={"help": "Image size, a number or HEIGHTxWIDTH in pixels. Default: the image processor's."},
    )
    keep_aspect_ratio: bool = field(
        default=False,
        metadata={"help": "Fit images into the size and pad batches instead of stretching. Default: false."},
    )

    def __post_init__(self) -> None:
        parse_image_size(self.image_size)
        if self.model_name_or_path is not None and self.config_name is not None:
            raise ValueError(
                "Give the student either as --model_name_or_path (trained) or as --config_name (from scratch), got "
                f"{self.model_name_or_path!r} and {self.config_name!r}."
            )
        if self.backbone_weights is not None and self.config_name is None:
            raise ValueError(
                "--backbone_weights needs --config_name: a trained student already has a trained backbone."
            )
        if self.init_from_teacher and self.config_name is None:
            raise ValueError("--init_from_teacher needs --config_name: a trained student already has weights.")


@dataclass
class ScriptArguments(StudentArguments, DataArguments):
    """Options of the script, with its data set and its student."""

    preset: str = field(
        default="ours",
        metadata={
            "help": "Defaults of the method's options: ours, which work on short schedules and students from nothing, "
            "or paper, those of its paper or released code, whose gradients have no limit (--max_gradient_ratio 0). "
            "Given options count in either case. Default: ours."
        },
    )
    run_control: bool = field(
        default=False,
        metadata={
            "help": "First train the same student without a teacher, in OUTPUT_DIR/control, for comparison. "
            "Default: false."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better mAP. Default: train to the end."},
    )
    measure_efficiency: bool = field(
        default=True,
        metadata={"help": "Measure operations and latency of teacher and student at the end. Default: true."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the run that --output_dir holds, and begin anew. Default: false."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print all arguments with their resolved values, and exit. Default: false."}
    )
    detections: str | None = field(
        default=None,
        metadata={
            "help": "For `hf-detrkd answer`: JSON file of COCO results (image_id, category_id, bbox, score) of any "
            "detector on the training images, which become answers in place of a teacher's."
        },
    )

    def __post_init__(self) -> None:
        DataArguments.__post_init__(self)
        StudentArguments.__post_init__(self)
        if self.preset not in ("ours", "paper"):
            raise ValueError(f"--preset must be ours or paper, got {self.preset!r}.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"--early_stopping_patience must be at least 1, got {self.early_stopping_patience}.")
