"""Turn the records of findings.py into tables."""

import findings_nets
import numpy as np
from findings_nets import CURVE, EVADING, REFERENCES
from records import format_table, name_class
from scipy import optimize

from defence.beyond import finding

LEAST_PROBABILITY = 0.01  # of a backdoor or of none, when nets are scored by cross-entropy
PEERS = {"cleanse": "Neural Cleanse", "margins": "MM-BD"}  # by their key in a record


def make_rows(group, nets):
    """Return a record of each net of a group, with its targets and its p-value of today."""
    targets = {net.name: list(net.targets) for net in nets}
    return [
        record | {"targets": targets[record["name"]]}
        for record in findings_nets.read_findings(group, nets)
    ]


def make_table(rows):
    """Return the Markdown table of rows."""
    heads = ["net", "targets", "ASR", "finding", "p", "score", "way", "rank of each target"]
    heads += PEERS.values()
    alignments = ["---", "---", "--:", "---", "--:", "--:", "---", "--:", *["---"] * len(PEERS)]
    cells = [
        [
            row["name"],
            ", ".join(map(name_class, row["targets"])) or "none",
            ", ".join(f"{100 * rate:.1f}" for rate in row.get("success", [])) or "–",
            "backdoor" if is_alarm(row) else "nothing",
            f"{row['p_value']:.3f}",
            f"{row['score']:.2f}",
            row["way"],
            ", ".join(map(str, row["ranks"])) or "–",
            *(describe_peer(row, peer) for peer in PEERS),
        ]
        for row in rows
    ]
    return format_table(heads, alignments, cells)


def is_alarm(row):
    return row["p_value"] <= finding.LEVEL


def describe_peer(row, peer):
    """Return what a peer says of a net; of a BadNet also whether it is a true target."""
    answer = row.get(peer)
    if answer is None:
        return "–"
    if not answer["alarm"]:
        return "nothing"
    if not row["targets"]:
        return "backdoor"
    return f"backdoor, {'right' if answer['class'] in row['targets'] else 'wrong'}"


def make_summary(groups):
    """Return a Markdown table with a line for each group of nets. groups: {name: rows}."""
    clean = [row for rows in groups.values() for row in rows if not row["targets"]]
    probability = fit_probability(groups)
    heads = ["nets", "alarms", "a true target first", "AUROC", "cross-entropy", *PEERS.values()]
    cells = []
    for group, rows in groups.items():
        cells.append([f"{len(rows)}, {group}", str(sum(map(is_alarm, rows)))])
        first, auroc = "–", "–"
        if rows[0]["targets"]:
            first = str(sum(min(row["ranks"]) == 1 for row in rows))
            pairs = [row["score"] > clean_row["score"] for row in rows for clean_row in clean]
            auroc = f"{np.mean(pairs):.3f}"
        entropy = np.mean([measure_entropy(row, probability) for row in rows])
        cells[-1] += [first, auroc, f"{entropy:.2f}", *(count_alarms(rows, peer) for peer in PEERS)]
    return format_table(heads, ["---", *["--:"] * (len(heads) - 1)], cells)


def count_alarms(rows, peer):
    """Return a peer's alarms, on BadNets only those for a true target, as tables show them."""
    if not any(row.get(peer) for row in rows):
        return "–"
    return str(sum(describe_peer(row, peer) in ("backdoor", "backdoor, right") for row in rows))


def fit_probability(groups):
    """Fit how likely a backdoor is by a net's score, on the nets that the scan was chosen by.

    Return the two coefficients of a logistic curve in the score's logarithm. The truth is smoothed
    by the number of nets, as J. Platt does (Probabilistic outputs for support vector machines,
    1999), so that a few nets make nobody certain.
    """
    rows = [row for group, rows in groups.items() if is_chosen_by(group) for row in rows]
    truth = np.array([bool(row["targets"]) for row in rows])
    smooth = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))

    def measure(coefficients):
        chances = np.array([predict_chance(row, coefficients) for row in rows])
        return -np.mean(smooth * np.log(chances) + (1 - smooth) * np.log(1 - chances))

    return optimize.minimize(measure, [5.0, 0.0], method="Nelder-Mead").x


def is_chosen_by(group):
    return group == REFERENCES or group.endswith("chosen by")


def predict_chance(row, coefficients):
    """Return how likely a net has a backdoor, by its score: LEAST_PROBABILITY to 1 - that."""
    slope, offset = coefficients
    chance = 1 / (1 + np.exp(-np.clip(slope * np.log(row["score"]) - offset, -30, 30)))
    return np.clip(chance, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)


def measure_entropy(row, coefficients):
    """Return the cross-entropy of the truth about a net; a coin has 0.69 (as in NIST's TrojAI)."""
    chance = predict_chance(row, coefficients)
    return -np.log(chance if row["targets"] else 1 - chance)


def make_tables():
    """Return the tables of the recorded findings, {name in the markers: Markdown}."""
    groups = {group: make_rows(group, nets) for group, nets in findings_nets.list_groups().items()}
    groups = {group: rows for group, rows in groups.items() if rows}
    summed_up = {group: rows for group, rows in groups.items() if group not in (CURVE, EVADING)}
    tables = {"findings, all": make_summary(summed_up)}
    return tables | {f"findings, {group}": make_table(rows) for group, rows in groups.items()}
