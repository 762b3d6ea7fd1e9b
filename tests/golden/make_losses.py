"""Makes the golden numbers of tests/losses/test_golden.py with TRL's own code.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers
    trl/bin/python make_losses.py losses.json
    trl/bin/pip install trl==1.0.0 scikit-learn joblib pandas pillow requests      # then, for XPO and BCO
    trl/bin/python make_losses.py losses_trl_1_0.json

TRL computes its losses inside trainer methods. Each number here comes from such a method run on an object made with
`__new__`, given only the attributes the method reads, and a model that returns fixed token log-probabilities: no
arithmetic of a loss is repeated in this file. Trainers return means over the batch, so rows are run one at a time to get
unreduced losses (batches of one), except for AOT, which couples them. Gradients are TRL's too, by backward().
"""

import collections
import json
import sys
import types

import numpy as np
import torch
import transformers
import trl

DTYPE = torch.float64
ROWS, TOKENS = 4, 6
CHOSEN_LENGTHS, REJECTED_LENGTHS = [6, 3, 1, 4], [2, 5, 3, 4]


def make_inputs():
    """Token log-probabilities [ROWS, TOKENS], 0 beyond each length, a reference near the policy, rewards."""
    generator = np.random.default_rng(20)

    def near(logps, mask):
        moved = logps + generator.normal(scale=0.6, size=logps.shape)
        return np.where(mask, np.minimum(moved, -0.01), 0.0)

    inputs = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}
    for side, lengths in (("chosen", CHOSEN_LENGTHS), ("rejected", REJECTED_LENGTHS)):
        mask = np.arange(TOKENS) < np.array(lengths)[:, None]
        logps = np.where(mask, -generator.gamma(2.0, 0.6, (ROWS, TOKENS)) - 0.02, 0.0)
        inputs[f"{side}_token_logps"] = logps.round(4).tolist()
        inputs[f"ref_{side}_token_logps"] = near(logps, mask).round(4).tolist()
    inputs["chosen_rewards"] = [0.3, -1.2, 2.0, 0.1]
    inputs["rejected_rewards"] = [-0.5, 0.4, 1.1, 0.1]
    inputs["margin"] = [0.5, 0.0, 1.0, -0.2]
    inputs["log_collisions"] = near(0 * logps - 1.0, True).round(4).tolist()
    inputs["desirable"] = [True, False, False, True]
    inputs["advantages"] = [1.3, -0.7, 0.4, -1.1]
    inputs["optimal_values"] = [0.6, 0.2, 0.9, -0.4]
    return inputs


class Accelerator:
    """One process: gathering and reducing change nothing."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True
    parallelism_config = None
    use_distributed = False

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction="sum"):
        return x


class Anything(dict):
    """Collects whatever a trainer logs."""

    def __missing__(self, key):
        self[key] = collections.defaultdict(list)
        return self[key]


def trainer(cls, **attributes):
    self = cls.__new__(cls)
    defaults = {
        "accelerator": Accelerator(),
        "model": types.SimpleNamespace(training=False),
        "_metrics": Anything(),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "beta": 0.1,
        "label_smoothing": 0.0,
    }
    for name, value in {**defaults, **attributes}.items():
        object.__setattr__(self, name, value)
    return self


def tensor(values, grad=False):
    return torch.tensor(values, dtype=DTYPE, requires_grad=grad)


def token_model(logps, collisions=None):
    """A model whose fused head reports these token log-probabilities."""
    zeros = torch.zeros_like(logps).detach()
    outputs = types.SimpleNamespace(
        log_probs=logps,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=zeros if collisions is None else collisions,
        label_mask=zeros.bool(),
    )
    return lambda **kwargs: outputs


def completion_inputs(lengths):
    """Ids and masks of one prompt token followed by completions of these lengths, padded to TOKENS."""
    mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    mask = torch.cat([torch.zeros(len(lengths), 1, dtype=torch.long), mask], 1)
    return {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }


def rowwise(run, rows=ROWS):
    """Runs batches of one; collects losses and the gradients of the completions' log-probabilities."""
    results = [run([b]) for b in range(rows)]
    return {
        key: [value for result in results for value in result[key]]
        for key in results[0]
    }


def finish(loss, **leaves):
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    result = {"loss": [loss.item()]}
    for name, leaf, grad in zip(leaves, leaves.values(), grads):
        grad = torch.zeros_like(leaf) if grad is None else grad
        result[f"grad_{name}"] = grad.tolist()
    return result


def dpo(inputs, loss_type, rows, *, ld_alpha=None, weighting=False, **attributes):
    from trl import DPOTrainer

    loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
    parts = {
        name: tensor(
            [inputs[f"{name}_token_logps"][b] for b in rows], "ref" not in name
        )
        for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")
    }
    collisions = tensor([inputs["log_collisions"][b] for b in rows]).repeat(2, 1)
    self = trainer(
        DPOTrainer,
        **{
            "loss_types": loss_types,
            "loss_weights": [1.0] * len(loss_types),
            "ld_alpha": ld_alpha,
            "use_weighting": weighting,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "precompute_ref_logps": False,
            "args": types.SimpleNamespace(
                discopop_tau=0.05, gradient_checkpointing_kwargs=None
            ),
            **attributes,
        },
    )
    self.model = types.SimpleNamespace(training=False, is_gradient_checkpointing=False)
    self.ref_model = token_model(
        torch.cat([parts["ref_chosen"], parts["ref_rejected"]])
    )
    model = token_model(torch.cat([parts["chosen"], parts["rejected"]]), collisions)
    lengths = [CHOSEN_LENGTHS[b] for b in rows] + [REJECTED_LENGTHS[b] for b in rows]
    loss = self._compute_loss(model, completion_inputs(lengths), False)
    result = finish(loss, chosen=parts["chosen"], rejected=parts["rejected"])
    # Every completion token enters through the sum, so the first one's gradient is the sum's.
    if ld_alpha is None:
        for side in ("chosen", "rejected"):
            result[f"grad_{side}"] = [row[0] for row in result[f"grad_{side}"]]
    return result


def dpo_cases(inputs):
    cases = {}
    plain = [
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sft",
        "sigmoid_norm",
    ]  # fmt: skip
    for name in plain:
        cases[name] = rowwise(lambda rows, n=name: dpo(inputs, n, rows))
    for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm"):
        cases[f"{name}/beta=0.7"] = rowwise(
            lambda rows, n=name: dpo(inputs, n, rows, beta=0.7)
        )
    for name, smoothing in (("robust", 0.2), ("exo_pair", 1e-3)):
        cases[f"{name}/label_smoothing={smoothing}"] = rowwise(
            lambda rows, n=name, s=smoothing: dpo(inputs, n, rows, label_smoothing=s)
        )
    everything = list(range(ROWS))
    for name in ("aot", "aot_unpaired"):
        for smoothing in (0.0, 0.2):
            cases[f"{name}/label_smoothing={smoothing}"] = dpo(
                inputs, name, everything, label_smoothing=smoothing
            )
    cases["sft/batch"] = dpo(inputs, "sft", everything)
    cases["mpo"] = rowwise(
        lambda rows: dpo(
            inputs, ["sigmoid", "bco_pair", "sft"], rows, loss_weights=[0.8, 0.2, 1.0]
        )
    )
    for divergence in ("forward_kl", "js_divergence"):
        for name in ("sigmoid", "ipo"):
            cases[f"{name}/{divergence}"] = rowwise(
                lambda rows, n=name, d=divergence: dpo(
                    inputs, n, rows, f_divergence_type=d
                )
            )
    cases["sigmoid/ld_alpha=0.3"] = rowwise(
        lambda rows: dpo(inputs, "sigmoid", rows, ld_alpha=0.3)
    )
    cases["sigmoid/weighting"] = rowwise(
        lambda rows: dpo(inputs, "sigmoid", rows, weighting=True)
    )
    # TRL knows how far float32's exponent may go there, but not float64's.
    global DTYPE
    DTYPE = torch.float32
    cases["sigmoid/alpha_divergence=0.5"] = rowwise(
        lambda rows: dpo(inputs, "sigmoid", rows, f_divergence_type="alpha_divergence")
    )
    DTYPE = torch.float64
    return cases


def kto_cases(inputs):
    from trl import KTOTrainer

    mismatched = tensor(np.sum(inputs["rejected_token_logps"], 1))
    ref_mismatched = tensor(np.sum(inputs["ref_rejected_token_logps"], 1))

    def run(rows, loss_type, shift):
        logps = tensor([inputs["chosen_token_logps"][b] for b in rows], True)
        ref_logps = tensor([inputs["ref_chosen_token_logps"][b] for b in rows])
        self = trainer(
            KTOTrainer,
            loss_type=loss_type,
            calculate_KL=loss_type == "kto",
            precompute_ref_logps=False,
            desirable_weight=1.3,
            undesirable_weight=0.8,
            args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        )
        self.model = types.SimpleNamespace(
            training=False, is_gradient_checkpointing=False
        )
        self.ref_model = token_model(ref_logps)
        self._compute_kl_logps = lambda model, batch: (
            ref_mismatched if model is self.ref_model else mismatched + shift
        )
        batch = completion_inputs([CHOSEN_LENGTHS[b] for b in rows])
        batch["label"] = torch.tensor([inputs["desirable"][b] for b in rows])
        loss = self._compute_loss(token_model(logps), batch, False)
        result = finish(loss, chosen=logps)
        result["grad_chosen"] = [row[0] for row in result["grad_chosen"]]
        result["kl"] = self._metrics["eval"]["kl"]
        return result

    return {
        "kto/kl>0": rowwise(lambda rows: run(rows, "kto", 3.0)),
        "kto/kl=0": rowwise(lambda rows: run(rows, "kto", -3.0)),
        "apo_zero_unpaired": rowwise(lambda rows: run(rows, "apo_zero_unpaired", 0.0)),
    }


def sums(inputs, lengths=None):
    """Leaves [ROWS]: summed log-probabilities, or averages where a trainer's forward would average."""
    leaves = []
    for side in ("chosen", "rejected"):
        total = np.sum(inputs[f"{side}_token_logps"], 1)
        divisor = inputs[f"{side}_lengths"] if lengths else 1
        leaves.append(tensor(total / divisor, True))
    return leaves


def method(call, chosen, rejected, average):
    """A trainer method that returns one loss per row."""
    losses = call(chosen, rejected)
    grads = torch.autograd.grad(losses.sum(), [chosen, rejected])
    if average:
        grads = (
            grads[0] / tensor(CHOSEN_LENGTHS),
            grads[1] / tensor(REJECTED_LENGTHS),
        )
    return {
        "loss": losses.tolist(),
        "grad_chosen": grads[0].tolist(),
        "grad_rejected": grads[1].tolist(),
    }


def cpo_cases(inputs):
    """`cpo_loss` is the preference term alone; its `cpo_alpha` likelihood is DPO's "sft"."""
    from trl.experimental.cpo import CPOTrainer

    cases = {}
    for name, loss_type, extra in (
        ("cpo", "sigmoid", {}),
        ("cpo/label_smoothing=0.2", "sigmoid", {"label_smoothing": 0.2}),
        ("cpo_hinge", "hinge", {}),
        ("cpo_ipo", "ipo", {}),
        ("simpo", "simpo", {}),
        ("simpo/beta=2", "simpo", {"beta": 2.0, "simpo_gamma": 1.0}),
        ("simpo/label_smoothing=0.2", "simpo", {"label_smoothing": 0.2}),
        ("alphapo/alpha=0.25", "simpo", {"alpha": 0.25}),
        ("alphapo/alpha=-0.5", "simpo", {"alpha": -0.5}),
    ):
        average = loss_type in ("ipo", "simpo")
        self = trainer(
            CPOTrainer,
            **{"loss_type": loss_type, "simpo_gamma": 0.5, "alpha": 0.0, **extra},
        )
        cases[name] = method(
            lambda c, r, s=self: s.cpo_loss(c, r)[0], *sums(inputs, average), average
        )
    return cases


def orpo_cases(inputs):
    """`get_batch_loss_metrics` with a forward that returns the averages and the chosen row's own likelihood."""
    from trl.experimental.orpo import ORPOTrainer

    def run(rows):
        totals = {
            side: tensor([np.sum(inputs[f"{side}_token_logps"][b]) for b in rows], True)
            for side in ("chosen", "rejected")
        }
        chosen = totals["chosen"] / tensor([CHOSEN_LENGTHS[b] for b in rows])
        rejected = totals["rejected"] / tensor([REJECTED_LENGTHS[b] for b in rows])
        self = trainer(ORPOTrainer)
        self.concatenated_forward = lambda model, batch: (
            chosen,
            rejected,
            chosen,
            rejected,
            -chosen.mean(),
        )
        loss, _ = self.get_batch_loss_metrics(None, None)
        return finish(loss, **totals)

    return {"orpo": rowwise(run)}


def two_token_logits(logps):
    """Logits [.., 2] whose log-softmax at index 0 is exactly these log-probabilities."""
    return torch.stack([logps, torch.log(-torch.expm1(logps))], -1)


def tpo_cases(inputs):
    from trl.experimental.tpo import TPOTrainer

    def run(rows, loss_type, smoothing):
        logps = {
            side: tensor([inputs[f"{side}_token_logps"][b] for b in rows], True)
            for side in ("chosen", "rejected")
        }
        stacked = torch.cat(list(logps.values()))
        logits = two_token_logits(torch.where(stacked == 0, -1.0, stacked))
        logits = torch.cat([logits, logits[:, -1:]], 1)
        self = trainer(
            TPOTrainer,
            loss_type=loss_type,
            tpo_alpha=0.0,
            tpo_l_gamma=0.5,
            beta=0.7,
            label_smoothing=smoothing,
        )
        batch = completion_inputs(
            [CHOSEN_LENGTHS[b] for b in rows] + [REJECTED_LENGTHS[b] for b in rows]
        )
        loss = self._compute_loss(
            lambda **kwargs: types.SimpleNamespace(logits=logits), batch, False
        )
        result = finish(loss, **logps)
        for side in logps:
            result[f"grad_{side}"] = [row[0] for row in result[f"grad_{side}"]]
        return result

    return {
        "tpo": rowwise(lambda rows: run(rows, "sigmoid", 0.0)),
        "tpo/label_smoothing=0.2": rowwise(lambda rows: run(rows, "sigmoid", 0.2)),
        "tpo-l": rowwise(lambda rows: run(rows, "tpo-l", 0.0)),
    }


def reward_cases(inputs):
    from trl import RewardTrainer

    def run(rows, margin, coefficient):
        rewards = [
            tensor([inputs[f"{side}_rewards"][b] for b in rows], True)
            for side in ("chosen", "rejected")
        ]
        self = trainer(
            RewardTrainer,
            args=types.SimpleNamespace(center_rewards_coefficient=coefficient),
        )
        outputs = types.SimpleNamespace(logits=torch.cat(rewards)[:, None])
        batch = (
            {"margin": tensor([inputs["margin"][b] for b in rows])} if margin else {}
        )
        loss = self.compute_loss(lambda **kwargs: outputs, batch)
        return finish(loss, chosen=rewards[0], rejected=rewards[1])

    return {
        "reward": rowwise(lambda rows: run(rows, False, None)),
        "reward/margin": rowwise(lambda rows: run(rows, True, None)),
        "reward/centering=0.01": rowwise(lambda rows: run(rows, True, 0.01)),
    }


def regression_cases(inputs):
    from trl.experimental.a2po import A2POTrainer

    def run(rows):
        logps = tensor([np.sum(inputs["chosen_token_logps"][b]) for b in rows], True)
        self = trainer(A2POTrainer, args=types.SimpleNamespace(beta2=0.3))
        self._get_sequence_logps = lambda *unused: logps
        batch = {
            "input_ids": None,
            "attention_mask": None,
            "logits_to_keep": None,
            "ref_logps": tensor(
                [np.sum(inputs["ref_chosen_token_logps"][b]) for b in rows]
            ),
            "rewards": tensor([inputs["chosen_rewards"][b] for b in rows]),
            "v_star": tensor([inputs["optimal_values"][b] for b in rows]),
        }
        return finish(self.compute_loss(None, batch), chosen=logps)

    return {"a2po": rowwise(run)}


def policy_cases(inputs):
    """Whole-batch losses with gradients [B, T]; the policy that sampled is the "reference" of the chosen rows."""
    from trl import GRPOTrainer, RLOOTrainer
    from trl.experimental.gmpo import GMPOTrainer

    mask = completion_inputs(CHOSEN_LENGTHS)["completion_mask"][:, 1:]

    def run(cls, name, level="token", **attributes):
        logps = tensor(inputs["chosen_token_logps"], True)
        old_logps = tensor(inputs["ref_chosen_token_logps"])
        settings = {
            "delta": None,
            "sapo_temperature_pos": 1.0,
            "sapo_temperature_neg": 1.05,
            "vespo_k_pos": 2.0,
            "vespo_lambda_pos": 3.0,
            "vespo_k_neg": 3.0,
            "vespo_lambda_neg": 2.0,
            "steps_per_generation": 1,
        }
        settings |= {k: attributes.pop(k) for k in list(attributes) if k in settings}
        self = trainer(
            cls,
            **{
                "beta": 0.0,
                "loss_type": name,
                "importance_sampling_level": level,
                "epsilon_low": 0.2,
                "epsilon_high": 0.2,
                "top_entropy_quantile": 1.0,
                "off_policy_mask_threshold": None,
                "use_vllm": False,
                "vllm_importance_sampling_correction": False,
                "max_completion_length": 10,
                "current_gradient_accumulation_steps": 1,
                "_entropy_bonus_enabled": False,
                "args": types.SimpleNamespace(**settings),
                **attributes,
            },
        )
        self._get_per_token_logps_and_entropies = lambda *a, **k: (
            logps,
            torch.zeros_like(logps),
            None,
        )
        batch = {
            "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
            "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
            "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "advantages": tensor(inputs["advantages"]),
            "old_per_token_logps": old_logps,
            "old_logps": (old_logps * mask).sum(1),
            "num_items_in_batch": mask.sum(),
        }
        loss = self._compute_loss(None, batch)
        result = finish(loss, logps=logps)
        result["metrics"] = {
            key: values[0]
            for key, values in self._metrics["eval"].items()
            if "clip_ratio" in key
        }
        return result

    high = {"epsilon_high": 0.28}
    cases = {
        name: run(GRPOTrainer, name, **high)
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")
    }
    cases["cispo"] = run(GRPOTrainer, "cispo", epsilon_high=1.5)
    cases["delta"] = run(GRPOTrainer, "dapo", delta=1.4)
    cases["gspo"] = run(GRPOTrainer, "grpo", "sequence", **high)
    cases["luspo"] = run(GRPOTrainer, "luspo", "sequence", **high)
    cases["rloo"] = run(RLOOTrainer, "rloo", **high)
    cases["gmpo"] = run(GMPOTrainer, "gmpo", epsilon_low=0.3, epsilon_high=0.5)
    return cases


def supervised_cases(inputs):
    from trl import SFTTrainer

    def run(name):
        logps = tensor(inputs["chosen_token_logps"], True)
        self = trainer(
            SFTTrainer,
            args=types.SimpleNamespace(
                loss_type=name, average_tokens_across_devices=False
            ),
            compute_loss_func=None,
            label_smoother=None,
        )
        batch = completion_inputs(CHOSEN_LENGTHS)
        model = token_model(logps)
        model().label_mask = batch["completion_mask"][:, 1:].bool()
        return finish(self.compute_loss(model, batch), logps=logps)

    return {"nll": run("nll"), "dft": run("dft")}


def online_cases(inputs):
    """XPO: chosen completions of rows 0 and 2 are the policy's, of rows 1 and 3 the reference's."""
    from trl.experimental.xpo import XPOTrainer

    chosen_mask = torch.tensor([True, False, True, False])

    def pick(prefix):
        chosen = tensor(inputs[f"{prefix}chosen_token_logps"], not prefix)
        rejected = tensor(inputs[f"{prefix}rejected_token_logps"], not prefix)
        by_model = torch.where(chosen_mask[:, None], chosen, rejected)
        by_reference = torch.where(chosen_mask[:, None], rejected, chosen)
        return chosen, rejected, by_model, by_reference

    def run(loss_type, alpha):
        chosen, rejected, model_data, ref_data = pick("")
        _, _, ref_model_data, ref_ref_data = pick("ref_")

        # Both are properties that read a schedule.
        Trainer = type("Trainer", (XPOTrainer,), {"beta": 0.1, "alpha": alpha})
        self = Trainer.__new__(Trainer)
        self.args = types.SimpleNamespace(loss_type=loss_type)
        _, preference, bonus = self._compute_losses(
            model_data, ref_data, ref_ref_data, ref_model_data, chosen_mask
        )
        losses = preference + bonus
        grads = torch.autograd.grad(losses.sum(), [chosen, rejected])
        return {
            "loss": losses.tolist(),
            "grad_chosen": grads[0][:, 0].tolist(),
            "grad_rejected": grads[1][:, 0].tolist(),
        }

    return {"xpo/alpha=0.05": run("sigmoid", 0.05), "online_ipo": run("ipo", 0.0)}


def bco_cases(inputs):
    """Chosen rows are desirable and rejected ones undesirable; the running mean has seen one batch."""
    from trl.experimental.bco import BCOTrainer
    from trl.experimental.bco.bco_trainer import RunningMoments

    self = trainer(BCOTrainer, embedding_func=None, embedding_tokenizer=None)
    self.running = RunningMoments(accelerator=Accelerator())
    chosen, rejected = sums(inputs)
    references = [
        tensor(np.sum(inputs[f"ref_{side}_token_logps"], 1))
        for side in ("chosen", "rejected")
    ]
    self.running.update(tensor([0.2, 0.5, -0.1]))
    losses, _, _, delta = self.bco_loss(
        chosen, rejected, *references, None, None, do_train=False
    )
    grads = torch.autograd.grad(losses.sum(), [chosen, rejected])
    return {
        "bco": {
            "loss": losses.tolist(),
            "delta": delta.item(),
            "grad_chosen": grads[0].tolist(),
            "grad_rejected": grads[1].tolist(),
        }
    }


def main(path):
    inputs = make_inputs()
    if trl.__version__.startswith("1.0."):
        sections = {"online": online_cases, "bco": bco_cases}
    else:
        sections = {
            "dpo": dpo_cases,
            "kto": kto_cases,
            "cpo": cpo_cases,
            "orpo": orpo_cases,
            "tpo": tpo_cases,
            "reward": reward_cases,
            "regression": regression_cases,
            "policy": policy_cases,
            "supervised": supervised_cases,
        }
    golden = {
        "made_by": "tests/golden/make_losses.py",
        "versions": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "inputs": inputs,
    }
    for name, make in sections.items():
        golden[name] = make(inputs)
    with open(path, "w") as file:
        json.dump(golden, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
