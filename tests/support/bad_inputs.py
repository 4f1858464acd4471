"""Bad inputs as data: what is wrong, the command, and what its one line must name.

`{d}` is the folder that `bad_files.write_files` fills; `run` in it is a sound working directory, and each of
`bad_files.CHANGES` is a copy of it in which something is wrong.
"""

from tests.support.bad_case import Case
from tests.support.bad_fields import DATA, MODELS, TRAINING

FLAGS = [
    Case("no config", "train", (), "--config: must name a config file", usual=False),
    Case("no working directory", "train", ("--workdir=",), "--workdir: must name a directory"),
    Case("unknown flag", "train", ("--wrokdir=x",), "wrokdir"),
    Case("an argument that is not a flag", "train", ("small.py",), "small.py: unexpected argument"),
    Case("a switch with a value that is neither true nor false", "train", ("--check=maybe",), "check"),
    Case("missing config file", "train", ("--config={d}/none.py",), "none.py"),
    Case("a folder as config file", "train", ("--config={d}",), "--config="),
    Case("config file that is not Python", "train", ("--config={d}/syntax.py",), "syntax.py"),
    Case("config file that is not text", "train", ("--config={d}/binary.txt",), "--config"),
    Case("config file that raises", "train", ("--config={d}/raises.py",), "no luck"),
    Case("config file without get_config", "train", ("--config={d}/empty.py",), "empty.py: must be a Python"),
    Case("get_config that returns nothing", "train", ("--config={d}/nothing.py",), "--config"),
    Case("get_config that returns a number", "train", ("--config={d}/number.py",), "--config"),
    Case("config file with an unknown section", "train", ("--config={d}/section.py",), "modle"),
    Case("config file with an unknown field", "train", ("--config={d}/field.py",), "model.widnow"),
    Case("config file whose section is a number", "train", ("--config={d}/flat.py",), "model = 3"),
    Case("config file with a wrong type", "train", ("--config={d}/type.py",), "model.d_model = '16'"),
    Case("unknown variant", "train", ("--config=configs/wt103.py:huge",), "variant = 'huge'"),
    Case("unknown section", "train", ("--config.modle.d_model=8",), "modle"),
    Case("unknown field", "train", ("--config.model.widnow=8",), "widnow"),
    Case("misspelt field", "train", ("--config.train.stpes=8",), "no such field; did you mean train.steps?"),
    Case(
        "a part of a field",
        "train",
        ("--config.train.mesh.fsdp=2",),
        "fsdp=2: must be --config.SECTION.FIELD=VALUE; no such field; did you mean train.mesh?",
    ),
    Case("field of another section", "train", ("--config.model.steps=8",), "did you mean train.steps?"),
    Case("unknown configuration", "train", ("--config=tinny",), "one of audio, books, copy"),
    Case("text for an integer", "train", ("--config.model.num_heads=many",), "num_heads"),
    Case("fraction for an integer", "train", ("--config.train.steps=1.5",), "steps"),
    Case("trace directory that is a file", "train", ("--profile={d}/binary.txt",), "--profile"),
]


def _workdir(name: str) -> str:
    return f"--workdir={{d}}/{name}"


WORKDIRS = [
    Case("a file as working directory", "train", (_workdir("binary.txt"),), "--workdir"),
    Case("a working directory below a file", "train", (_workdir("binary.txt/run"),), "--workdir"),
    Case("a working directory that cannot be written", "train", ("--workdir=/proc/run",), "--workdir=/proc/run"),
    Case("a working directory with another model", "train", (_workdir("other_model"),), "model.d_model: 32 -> 16"),
    Case(
        "another seed than that of the run", "train", (_workdir("run"), "--config.train.seed=1"), "train.seed: 0 -> 1"
    ),
    Case(
        "another tokenizer than the run's",
        "train",
        (_workdir("run"), "--config.data.tokenizer={d}/words.json"),
        "data.tokenizer = '{d}/words.json': must be the tokenizer of the run in",
    ),
    Case("a damaged record of its texts", "train", (_workdir("texts_deep"),), "texts.json: cannot be read"),
    Case(
        "a working directory in which another run trains",
        "train",
        (_workdir("held"),),
        "another run is training into it",
    ),
    Case("a configuration that is cut off", "train", (_workdir("config_cut"),), "no readable config.json"),
    Case("a configuration of another version", "train", (_workdir("config_future"),), "model.width"),
    Case("a configuration that is not text", "train", (_workdir("config_binary"),), "no readable config.json"),
    Case("a folder as configuration", "train", (_workdir("config_folder"),), "no readable config.json"),
    Case("a configuration that is a list", "train", (_workdir("config_list"),), "config.json"),
    Case("damaged checkpoints only", "train", (_workdir("all_damaged"),), "has no usable checkpoint"),
    Case("a file as checkpoint folder", "train", (_workdir("checkpoints_file"),), "checkpoints"),
    Case("a folder as metrics file", "train", (_workdir("metrics_folder"),), "metrics.jsonl"),
    Case("a file as TensorBoard folder", "train", (_workdir("tensorboard_file"),), "tensorboard"),
    Case("a folder as lock file", "train", (_workdir("lock_folder"),), ".lock"),
    *(
        Case(what, command, (_workdir(name),), says)
        for what, name, says in (
            ("its configuration is nested without end", "config_deep", "nested too deeply"),
            (
                "its configuration has a million blocks",
                "config_blocks",
                "model.num_blocks = 1000000: must make at most 1,000 layers",
            ),
            ("its configuration has other widths", "config_d_ff", "down_kernel has shape (24, 16) instead of (16, 16)"),
            ("its configuration has an endless window", "config_window", "model.generation_window = 1000000000"),
            ("a NUL in a path of its configuration", "config_nul", "data.validation_files = "),
            ("half a character in a path of its configuration", "config_half", "data.validation_files = "),
        )
        for command in ("evaluate", "generate")
    ),
    Case(
        "a configuration that would search the disk", "evaluate", (_workdir("config_walk"),), "would search more than"
    ),
    Case("to evaluate without a working directory", "evaluate", (), "--workdir: must name", usual=False),
    Case(
        "to evaluate a working directory that does not exist",
        "evaluate",
        (_workdir("none"),),
        "no readable config.json",
    ),
    Case("to evaluate a file as working directory", "evaluate", (_workdir("binary.txt"),), "no readable config.json"),
    Case("to evaluate an unknown split", "evaluate", ("--split=exam",), "split"),
    Case("to evaluate a split without text", "evaluate", ("--split=test",), "data.test_files"),
    Case("to evaluate a text that was moved", "evaluate", (_workdir("no_text"),), "moved.txt"),
    Case("to evaluate a step that was not saved", "evaluate", ("--step=7",), "no checkpoint of step 7"),
    Case("to evaluate a negative step", "evaluate", ("--step=-1",), "step"),
    Case("to evaluate a step that is not a number", "evaluate", ("--step=last",), "step"),
    Case("to evaluate without a tokenizer", "evaluate", (_workdir("tokenizer_gone"),), "no readable tokenizer"),
    Case("to evaluate with a damaged tokenizer", "evaluate", (_workdir("tokenizer_binary"),), "tokenizer"),
    Case("to evaluate with a tokenizer of another kind", "evaluate", (_workdir("tokenizer_list"),), "tokenizer"),
    Case("to evaluate damaged checkpoints", "evaluate", (_workdir("all_damaged"),), "has no usable checkpoint"),
    Case("to evaluate without checkpoints", "evaluate", (_workdir("no_checkpoint"),), "holds no checkpoint"),
    Case(
        "to evaluate an empty checkpoint folder", "evaluate", (_workdir("checkpoints_empty"),), "no finished checkpoint"
    ),
    Case("to evaluate a file as checkpoint folder", "evaluate", (_workdir("checkpoints_file"),), "holds no checkpoint"),
]

BUCKET = "must be a local path; to use a bucket, mount it"
PATHS = [
    Case("a bucket as working directory", "train", ("--workdir=gs://bucket/run",), BUCKET),
    Case("another bucket", "train", ("--workdir=s3://bucket/run",), BUCKET),
    Case("to start from a bucket", "train", ("--init_from=gs://bucket/run",), BUCKET),
    Case("a trace directory in a bucket", "train", ("--profile=gs://bucket/trace",), BUCKET),
    Case("a config file in a bucket", "train", ("--config=gs://bucket/small.py",), BUCKET),
    Case("text in a bucket", "train", ("--config.data.train_files=gs://bucket/*.txt",), BUCKET),
    Case("a tokenizer at a URL", "train", ("--config.data.tokenizer=https://host/tokenizer.json",), BUCKET),
    Case("a cache in a bucket", "train", (), BUCKET, cache="s3://bucket/cache"),
    Case("to evaluate a bucket", "evaluate", ("--workdir=gs://bucket/run",), BUCKET),
    Case("a text in a bucket", "evaluate", ("--text_file=gs://bucket/a.txt",), BUCKET),
    Case("a result file in a bucket", "evaluate", ("--out=gs://bucket/x.json",), BUCKET),
    Case("to generate from a bucket", "generate", ("--workdir=s3://bucket/run",), BUCKET),
    Case("a prompt in a bucket", "generate", (_workdir("run"), "--prompt_file=s3://bucket/a.txt"), BUCKET, usual=False),
    Case("weights in a bucket", "convert", ("--from=gs://bucket/a.pt",), BUCKET),
    Case(
        "weights to write into a bucket", "convert", (_workdir("run"), "--to=gs://b/a.safetensors"), BUCKET, usual=False
    ),
    Case("a sweep directory in a bucket", "sweep", ("--out=gs://bucket/sweep",), BUCKET),
    Case("a directory of records in a bucket", "sweep", ("--results=gs://bucket/records",), BUCKET),
    Case("a report on records in a bucket", "report", ("--results=gs://bucket/records",), BUCKET),
    Case("a report file in a bucket", "report", ("--out=gs://bucket/report.md",), BUCKET),
    Case("a tabulator in a path", "train", ("--workdir={d}/a\tb",), "a\\tb': must hold printable characters"),
    Case("the home of an unknown user", "train", ("--workdir=~nobody-of-this-name/run",), "cannot be resolved"),
    Case("a link as lock file", "train", (_workdir("lock_link"),), ".lock cannot be written (it is a link)"),
    Case(
        "a link as metrics file", "train", (_workdir("metrics_link"),), "metrics.jsonl cannot be written (it is a link)"
    ),
    Case("a link as TensorBoard folder", "train", (_workdir("tensorboard_link"),), "tensorboard cannot be written"),
    Case("a link as checkpoint folder", "train", (_workdir("checkpoints_link"),), "checkpoints cannot be written"),
    Case("a link as configuration", "train", (_workdir("config_link"),), "no readable config.json (it is a link)"),
    Case("to evaluate a pipe as configuration", "evaluate", (_workdir("config_pipe"),), "it is not a regular file"),
    Case("to evaluate a link as tokenizer", "evaluate", (_workdir("tokenizer_link"),), "it is a link"),
    Case(
        "to evaluate a link as checkpoint folder", "evaluate", (_workdir("checkpoints_link"),), "checkpoints is a link"
    ),
    Case("to evaluate checkpoints that are links", "evaluate", (_workdir("steps_link"),), "has no usable checkpoint"),
    Case("to evaluate a wrongly named checkpoint", "evaluate", (_workdir("step_zero"),), "has no usable checkpoint"),
    Case("to evaluate an old layout", "evaluate", (_workdir("old_layout"),), "has no usable checkpoint"),
]

EVALUATION = [
    *(
        Case(what, "evaluate", (f"--text_file={{d}}/{name}",), says)
        for what, name, says in (
            ("a text that does not exist", "none.txt", "cannot be read (No such file"),
            ("a folder as text", "folder.txt", "cannot be read (Is a directory)"),
            ("an empty text to evaluate", "empty.txt", "must hold some text"),
            ("a text to evaluate that is not UTF-8", "binary.txt", "not valid UTF-8"),
        )
    ),
    Case("a text and a split", "evaluate", ("--text_file={d}/short.txt", "--split=train"), "--split, --text_file"),
    Case("length 0", "evaluate", ("--length=0",), "length"),
    Case("a length that the split cannot fill", "evaluate", ("--length=901",), "--length=901: must be at most 900"),
    Case("a length above int32", "evaluate", ("--length=9999999999",), "--length=9999999999"),
    Case("lengths that are not numbers", "evaluate", ("--lengths=1k",), "--lengths=1k"),
    Case("a negative length", "evaluate", ("--lengths=64,-1",), "--lengths=64,-1: must be"),
    Case("lengths that the split cannot fill", "evaluate", ("--lengths=64,1000",), "--lengths=1000: must be at most"),
    Case(
        "lengths that a text cannot fill",
        "evaluate",
        ("--text_file={d}/short.txt", "--lengths=6"),
        "--lengths=6: must be at most 5",
    ),
    Case("batch size 0", "evaluate", ("--batch_size=0",), "batch_size"),
    Case("a result file that is a folder", "evaluate", ("--out={d}/run",), "--out={d}/run: must be a file"),
    Case(
        "a result file in a folder that does not exist", "evaluate", ("--out={d}/none/x.json",), "--out={d}/none/x.json"
    ),
    Case("a result file below a file", "evaluate", ("--out={d}/binary.txt/x.json",), "--out="),
]

GENERATION = [
    Case("no prompt", "generate", (_workdir("run"),), "--prompt, --prompt_file: give one", usual=False),
    Case("two prompts", "generate", ("--prompt_file={d}/short.txt",), "--prompt, --prompt_file: give one"),
    Case("an empty prompt", "generate", ("--prompt=",), "--prompt: must hold some text"),
    Case("half a surrogate pair as prompt", "generate", ("--prompt=a\udcff",), "must be text"),
    *(
        Case(what, "generate", (_workdir("run"), f"--prompt_file={{d}}/{name}"), says, usual=False)
        for what, name, says in (
            ("a prompt file that does not exist", "none.txt", "cannot be read (No such file"),
            ("a folder as prompt file", "folder.txt", "cannot be read (Is a directory)"),
            ("an empty prompt file", "empty.txt", "must hold some text"),
            ("a prompt file that is not UTF-8", "binary.txt", "not valid UTF-8"),
        )
    ),
    Case("a negative number of tokens", "generate", ("--max_new_tokens=-1",), "--max_new_tokens=-1"),
    Case("a number of tokens that is not a number", "generate", ("--max_new_tokens=many",), "max_new_tokens"),
    Case("a negative temperature", "generate", ("--temperature=-1",), "--temperature=-1"),
    Case("a temperature that is not a number", "generate", ("--temperature=nan",), "--temperature=nan"),
    Case("top_k 0", "generate", ("--top_k=0",), "--top_k=0"),
    Case("top_p above 1", "generate", ("--top_p=1.5",), "--top_p=1.5"),
    Case("a negative min_p", "generate", ("--min_p=-0.1",), "--min_p=-0.1"),
    Case("a repetition penalty of 0", "generate", ("--repetition_penalty=0",), "--repetition_penalty=0"),
    Case("a 4-bit cache", "generate", ("--cache_dtype=int4",), "--cache_dtype=int4"),
    Case("a negative seed", "generate", ("--seed=-1",), "--seed=-1: must be an integer from 0 to 4294967295\n"),
    Case("0 samples", "generate", ("--num_samples=0",), "--num_samples=0"),
    Case("an empty stop text", "generate", ("--stop=",), "--stop="),
    Case(
        "to generate from a working directory that does not exist",
        "generate",
        (_workdir("none"),),
        "no readable config.json",
    ),
    Case("to generate without a tokenizer", "generate", (_workdir("tokenizer_gone"),), "no readable tokenizer"),
    Case("to generate from damaged checkpoints", "generate", (_workdir("all_damaged"),), "has no usable checkpoint"),
    Case("to generate from a step that was not saved", "generate", ("--step=7",), "no checkpoint of step 7"),
]

CONVERSION = [
    Case("neither weights nor a file to write", "convert", (), "--from, --to: give one"),
    Case(
        "weights and a file to write",
        "convert",
        ("--from={d}/sound.safetensors", "--to={d}/x.safetensors"),
        "--from, --to: give one",
    ),
    Case(
        "weights without a config",
        "convert",
        ("--from={d}/sound.safetensors", _workdir("new")),
        "--config",
        usual=False,
    ),
    Case("weights that do not exist", "convert", ("--from={d}/none.safetensors",), "none.safetensors"),
    Case("weights of an unknown kind", "convert", ("--from={d}/table.csv",), "table.csv"),
    Case("a folder as weights", "convert", ("--from={d}/run",), "must end in .safetensors, .pt or .pth"),
    Case(
        "a .safetensors that is something else", "convert", ("--from={d}/nonsense.safetensors",), "nonsense.safetensors"
    ),
    Case("a .safetensors that is cut off", "convert", ("--from={d}/cut.safetensors",), "cut.safetensors"),
    Case(
        "a .safetensors without a weight",
        "convert",
        ("--from={d}/missing.safetensors",),
        "missing transformer.norm.bias",
    ),
    Case("a .safetensors with a weight of another shape", "convert", ("--from={d}/shape.safetensors",), "has shape"),
    Case(
        "a .safetensors with a weight that is not finite", "convert", ("--from={d}/infinite.safetensors",), "not finite"
    ),
    Case(
        "a .safetensors that is something else", "convert", ("--from={d}/nonsense.safetensors",), "nonsense.safetensors"
    ),
    Case(
        "weights of another model", "convert", ("--from={d}/sound.safetensors", "--config.model.d_ff=32"), "has shape"
    ),
    Case(
        "weights into a directory that is not empty",
        "convert",
        ("--from={d}/sound.safetensors", _workdir("run")),
        "must be a new",
    ),
    Case("weights into a file", "convert", ("--from={d}/sound.safetensors", _workdir("binary.txt")), "must be a new"),
    Case(
        "weights into a directory that cannot be created",
        "convert",
        ("--from={d}/sound.safetensors", "--workdir=/proc/run"),
        "workdir /proc/run",
    ),
    *(
        Case(what, "convert", (_workdir(name), f"--to={{d}}/{to}"), says, usual=False)
        for what, name, to, says in (
            ("to write a .pt", "run", "x.pt", "must end in .safetensors"),
            ("to write over a file", "run", "nonsense.safetensors", "nonsense.safetensors"),
            ("to write into a folder that does not exist", "run", "none/x.safetensors", "x.safetensors"),
            ("to convert a working directory that does not exist", "none", "x.safetensors", "no readable config.json"),
            ("to convert damaged checkpoints", "all_damaged", "x.safetensors", "has no usable checkpoint"),
        )
    ),
]

BENCHMARKS = [
    Case("lengths that are not numbers", "benchmarks.inference", ("--lengths=1k",), "--lengths=1k: must be integers"),
    Case("batch size 0", "benchmarks.inference", ("--lengths=8x0",), "--lengths=8x0: must be"),
    Case("an unknown part", "benchmarks.inference", ("--parts=all",), "--parts = 'all'"),
    Case("an unknown architecture", "benchmarks.inference", ("--architectures=rnn",), "--architectures = 'rnn'"),
    Case("an infinite measurement", "benchmarks.inference", ("--seconds=inf",), "--seconds"),
    Case("window 0", "benchmarks.inference", ("--window=0",), "window"),
    Case(
        "a working directory that does not exist",
        "benchmarks.inference",
        (_workdir("none"),),
        "no readable config.json",
    ),
    Case("length 0", "benchmarks.training", ("--lengths=0",), "--lengths=0: must be"),
    Case("0 steps", "benchmarks.training", ("--steps=0",), "steps"),
    Case("a field that does not exist", "benchmarks.training", ("--set=model.depth=3",), "model.depth=3"),
    Case("a setting without a value", "benchmarks.training", ("--try=faster",), "faster"),
    Case("a setting that is not allowed", "benchmarks.training", ("--try=model.num_heads=5",), "model.num_heads = 5"),
    Case("a result directory that is a file", "benchmarks.training", ("--out={d}/binary.txt",), "--out"),
    Case("0 trials", "tools.faults", ("--trials=0",), "trials"),
    Case("an unknown signal", "tools.faults", ("--signal=hup",), "signal"),
    Case("a report directory that is a file", "tools.faults", ("--out={d}/binary.txt",), "--out"),
]

SEVERAL = ("--coordinator_address=localhost:1", "--num_processes=2", "--process_id=0")
SWEEPS = [
    Case("no sweep", "sweep", (), "--sweep: must name a sweep file", usual=False),
    Case("a sweep that does not exist", "sweep", ("--sweep={d}/none.py",), "none.py: cannot be read (No such file"),
    Case("a folder as sweep", "sweep", ("--sweep={d}",), "cannot be read (Is a directory)"),
    Case("a sweep that is not Python", "sweep", ("--sweep={d}/syntax.py",), "syntax.py, line 1"),
    Case("a sweep without get_sweep", "sweep", ("--sweep={d}/small.py",), "a function get_sweep; it has none"),
    Case("a sweep without a point", "sweep", ("--sweep={d}/sweep_empty.py",), "at least one point"),
    Case("an unknown sweep", "sweep", ("--sweep=window",), "one of architectures, capacity"),
    Case("an unknown variant of a sweep", "sweep", ("--sweep=configs/sweep_windows.py:huge",), "variant = 'huge'"),
    Case("a point that is not allowed", "sweep", ("--sweep={d}/sweep_point.py",), "point two: model.num_heads = 3"),
    Case("a point with an unknown field", "sweep", ("--sweep={d}/sweep_field.py",), "point one: model.widnow = 3"),
    Case(
        "a sweep without text", "sweep", ("--config.data.train_files=none/*.txt",), "point one-seed0: data.train_files"
    ),
    Case("a sweep with --config", "sweep", ("--config={d}/small.py",), "--config: must be left out"),
    Case("a sweep with an unknown field", "sweep", ("--config.model.widnow=3",), "--config.model.widnow=3"),
    Case("a field that a point sets itself", "sweep", ("--config.train.steps=3",), "point two sets this field itself"),
    Case("train.seed for a sweep", "sweep", ("--config.train.seed=3",), "--seeds changes them"),
    Case("a seed with an underscore", "sweep", ("--seeds=1_000",), "--seeds=1_000: must be integers"),
    Case("seeds that are not numbers", "sweep", ("--seeds=0,x",), "--seeds=0,x: must be integers"),
    Case("a negative seed", "sweep", ("--seeds=0,-1",), "--seeds=0,-1: must be integers from 0 to 4294967294,"),
    Case("no seeds", "sweep", ("--seeds=",), "--seeds=: must be integers from 0"),
    Case("a job number above the points", "sweep", ("--point=2",), "--point=2: must be 0 .. 1"),
    Case("more jobs than points", "sweep", ("--point=0", "--points=3"), "--points=3: must be 1 .. 2"),
    Case("jobs without a job number", "sweep", ("--points=2",), "--points: needs --point"),
    Case("an unknown action", "sweep", ("--then=dance",), "'dance' must be"),
    Case("an unknown action after training", "train", ("--then=dance",), "'dance' must be"),
    Case("to check an unknown action", "check", ("--config={d}/small.py", "--then=dance"), "'dance' must be"),
    Case(
        "to check an action on samples that the text cannot fill",
        "check",
        ("--config={d}/small.py", "--then=history@2000"),
        "history@2000: data.sequence_length = 2000: the validation split has only",
    ),
    Case(
        "to check a sweep's action on samples that the text cannot fill",
        "sweep",
        ("--check", "--then=history@2000"),
        "point one-seed0: history@2000: data.sequence_length = 2000: the validation split has only",
    ),
    Case(
        "to check actions of several processes",
        "check",
        ("--config={d}/small.py", "--then=evaluate", *SEVERAL),
        "--then=evaluate: works only with one process",
    ),
    Case("a sweep without a directory", "sweep", ("--out=",), "--out: must name a directory"),
    Case("a sweep directory that is a file", "sweep", ("--out={d}/binary.txt",), "--out="),
    Case("a directory of records that is a file", "sweep", ("--results={d}/binary.txt",), "--results="),
    Case("a report without records", "report", (), "--results: must name a directory", usual=False),
    Case("a report without a file", "report", ("--out=",), "--out: must name a Markdown file"),
    Case("a report on an empty folder", "report", ("--results={d}/folder.txt",), "at least one record"),
    Case("a report on files that are not records", "report", (), "other.json: is not a record of a run"),
]

GROUPS = {
    "Flags and config files": FLAGS,
    "Fields of the model": MODELS,
    "Fields of training and of the mesh": TRAINING,
    "Data": DATA,
    "Working directories and checkpoints": WORKDIRS,
    "Paths, buckets and links": PATHS,
    "Texts and options of evaluation": EVALUATION,
    "Prompts and options of generation": GENERATION,
    "Weights to convert": CONVERSION,
    "Sweeps and reports": SWEEPS,
    "Benchmarks": BENCHMARKS,
}
