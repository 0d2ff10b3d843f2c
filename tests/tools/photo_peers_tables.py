"""Turn the records of photo_peers.py into tables."""

import numpy as np
from peer_detectors import DETECTORS
from peer_repairs import REPAIRS
from records import format_table

BADNET, CLEAN, REPORT, OURS = "B", "clean", "report", "ours"
DATASETS = {
    "signs": "43 traffic signs",
    "yale": "38 people",
    "gtsrb": "43 traffic signs, new to B",
    "tinyb": "12 kinds of things",
    "cifar": "10 kinds of objects",
    "digits": "10 digits in sign language",
}
RELEARNED = (10, 50)  # steps
WORKS = 0.5  # of the images, at least, on which an attack in the summary succeeds
NETS = [BADNET, CLEAN, *REPAIRS]
PAIRED = [OURS, REPORT]  # whose repaired net judges images together with B
JUDGES = [*PAIRED, *DETECTORS]
ACCURACY, SUCCESS = "clean_accuracy", "attack_success_rate"
RATING, DETECTION = "defense_effectiveness_rating", "detection_rate"
TRUE_RATE = "detection_rate_at_true_rate"
NONE = "–"
HEAD = """# Our repair and our detector beside published ones, on photographs

`make photographs IMAGES=FOLDER`, or `python tests/tools/photo_peers.py NAME …`

All figures are in %, on test images. ACC is the clean accuracy, ASR the attack success rate. DER is
the defense effectiveness rating, (max(0, fall of ASR) − max(0, fall of ACC) + 1) / 2.
"B" is the BadNet, "clean" a net of the same dataset and architecture that never was poisoned: six
nets, each of which stands beside all BadNets like it.
"After 10" is the ASR after 10 steps of Adam on 16 poisoned and 48 clean training images.
Detectors flag what exceeds the threshold that the held-out tenth of the clean images sets for 1 %,
or their highest score, where these are fewer than 99 images: of yale, att, tiny… and digits.
The detection rate is of the poisoned images that B answers with the target.
[peer_repairs.py](../tools/peer_repairs.py) and [peer_detectors.py](../tools/peer_detectors.py) say
what the methods are, and how we adapted them. Of GTSRB, the validation and test files have images
of the same signs, so that training on one raises ACC on the other.

The authors publish these figures, of other nets than ours: BackdoorBench, CIFAR-10, 10 % poisoned,
5 % clean, mean ACC / ASR: FT 92.5 / 31.2, NAD 92.2 / 29.6, ANP 78.0 / 22.0, I-BAU 88.1 / 16.7;
D3, mean ASR of seven attacks: 0.5; TED++, mean AUROC of nine attacks: 0.96.
"""


def format_rate(value):
    return NONE if value is None else f"{100 * value:.1f}"


def average(records, *keys):
    """Return the mean of a figure as a table shows it. keys: of it, in nested dicts."""
    values = []
    for record in records:
        for key in keys:
            record = record.get(key) if record else None
        if record is not None:
            values.append(record)
    return format_rate(np.mean(values)) if values else NONE


def count_ahead(records, method, figure):
    """Return in how many of the nets ours has a higher figure than a method, or the same.

    records: {(net, method): record}.
    """
    if method == OURS:
        return NONE
    nets = dict.fromkeys(net for net, _ in records)
    pairs = [[records.get((net, key), {}).get(figure) for key in (OURS, method)] for net in nets]
    pairs = [pair for pair in pairs if None not in pair]
    return f"{sum(ours >= theirs for ours, theirs in pairs)} of {len(pairs)}" if pairs else NONE


def choose_records(records, method, figure):
    """Return the records of a method that have a figure. records: {(net, method): record}."""
    return [record for (_, key), record in records.items() if key == method and figure in record]


def make_means(records):
    """Return the table of the repairs' means over the nets."""
    heads = ["method", "nets", "ACC", "ASR", "highest ASR", "DER"]
    heads += [*(f"after {steps}" for steps in RELEARNED), "processor seconds", "ours ahead by DER"]
    rows = []
    for method in NETS:
        own = choose_records(records, method, SUCCESS)
        if not own:
            continue
        highest = format_rate(max(record[SUCCESS] for record in own))
        figures = [average(own, ACCURACY), average(own, SUCCESS), highest, average(own, RATING)]
        figures += [average(own, "relearned", str(steps)) for steps in RELEARNED]
        seconds = f"{np.mean([record['seconds'] for record in own]):.0f}"
        ahead = count_ahead(records, method, RATING)
        rows.append([method, str(len(own)), *figures, seconds, ahead])
    return format_table(heads, ["---", *["--:"] * (len(heads) - 1)], rows)


def make_detector_means(records):
    """Return the table of the detectors' means over the nets."""
    heads = ["method", "nets", "detection rate", "lowest", "false-positive rate"]
    heads += ["detection rate where 1 % of test images are flagged", "ours ahead"]
    rows = []
    for method in JUDGES:
        own = choose_records(records, method, DETECTION)
        if own:
            lowest = format_rate(min(record[DETECTION] for record in own))
            figures = average(own, DETECTION), lowest, average(own, "false_positive_rate")
            figures += average(own, TRUE_RATE), count_ahead(records, method, DETECTION)
            rows.append([method, str(len(own)), *figures])
    return format_table(heads, ["---", *["--:"] * (len(heads) - 1)], rows)


def make_table(records, methods, describe):
    """Return a table with a row for each net and a column for each method.

    describe: turns a record into the text of a cell.
    """
    nets = dict.fromkeys(net for net, _ in records)
    methods = [method for method in methods if any(key == method for _, key in records)]
    rows = [
        [net, *(describe(records.get((net, method), {})) for method in methods)] for net in nets
    ]
    return format_table(["net", *methods], ["---", *["--:"] * len(methods)], rows)


def describe_rates(*names):
    """Return a function that shows some figures of a record, or a dash where it has none."""

    def describe(record):
        return " / ".join(map(format_rate, map(record.get, names))) if names[0] in record else NONE

    return describe


def describe_relearned(record):
    rates = record.get("relearned")
    return " / ".join(format_rate(rates[str(steps)]) for steps in RELEARNED) if rates else NONE


def make_groups(records, groups):
    """Return {group: its records, {(net, method): record}}, without the groups that have none.

    groups: {group: names of nets}.
    """
    pairs = {(record["net"], record["method"]): record for record in records}
    parts = {
        group: {pair: pairs[pair] for name in names for pair in pairs if pair[0] == name}
        for group, names in groups.items()
    }
    return {group: part for group, part in parts.items() if part}


def make_summary(records, names):
    """Return a table with a row for each dataset: what repair.py leaves, and what it catches.

    records: of photo_peers.py.  names: of the BadNets that count, where B and ours have a record
    and the attack succeeds on WORKS of the images.
    """
    pairs = {(record["net"], record["method"]): record for record in records}
    names = [name for name in names if {(name, BADNET), (name, OURS)} <= pairs.keys()]
    names = [name for name in names if pairs[name, BADNET][SUCCESS] >= WORKS]
    heads = ["images", "nets", "ACC of B; of G hardened", "ASR of B; of the report's G"]
    heads += ["ASR of G hardened; highest", "caught; least", "clean flagged"]
    rows = []
    for dataset in dict.fromkeys(name.split("-")[0] for name in names):
        nets = [name for name in names if name.split("-")[0] == dataset]
        badnet, report, ours = (
            [pairs[name, method] for name in nets if (name, method) in pairs]
            for method in (BADNET, REPORT, OURS)
        )
        highest, least = max(r[SUCCESS] for r in ours), min(r[DETECTION] for r in ours)
        cells = [
            f"{average(badnet, ACCURACY)}; {average(ours, ACCURACY)}",
            f"{average(badnet, SUCCESS)}; {average(report, SUCCESS)}",
            f"{average(ours, SUCCESS)}; {format_rate(highest)}",
            f"{average(ours, DETECTION)}; {format_rate(least)}",
            average(ours, "false_positive_rate"),
        ]
        rows.append([DATASETS.get(dataset, dataset), str(len(nets)), *cells])
    return format_table(heads, ["---", *["--:"] * (len(heads) - 1)], rows)


def make_document(records, groups):
    """Return the document of all tables. records: of photo_peers.py.  groups: {group: nets}."""
    texts = [HEAD]
    for group, part in make_groups(records, groups).items():
        tables = {
            "repairs, means": make_means(part),
            "detectors at 1 %, means": make_detector_means(part),
            "ACC / ASR": make_table(part, NETS, describe_rates(ACCURACY, SUCCESS)),
            "DER": make_table(part, NETS, describe_rates(RATING)),
            "ASR after relearning, 10 / 50 steps": make_table(part, NETS, describe_relearned),
            "detection rate / false-positive rate": make_table(
                part, JUDGES, describe_rates(DETECTION, "false_positive_rate")
            ),
        }
        texts += [f"\n## {group}: {title}\n\n{table}\n" for title, table in tables.items()]
    return "".join(texts)
