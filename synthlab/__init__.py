"""synthlab: a Jupyter-first research laboratory for synthetic LLM training data."""
import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# name -> module. Resolved on first use, so that `import synthlab` loads neither torch nor jax nor ipywidgets.
_WHERE = {
    "synthlab.core": ("Accounting", "BadInput", "Criterion", "Example", "Group", "Reference", "Rollout", "Rubric", "SynthlabError", "Task", "Usage", "Verdict", "new_task"),
    "synthlab.store": ("Store",),
    "synthlab.tasks": ("load_tasks",),
    "synthlab.lm.backends": ("Request", "Sampling", "load_lm"),
    "synthlab.lm.rollouts": ("sample",),
    "synthlab.scoring.logprobs": ("score",),
    "synthlab.scoring.groups": ("group_advantages", "kl", "majority", "pass_at_k"),
    "synthlab.checks.verify": ("extract_answer", "verifier", "verify"),
    "synthlab.methods.augment": ("augment", "make_augmenter", "mix"),
    "synthlab.methods.cat": ("estimate", "reward", "synthesize"),
    "synthlab.methods.compare": ("compare",),
    "synthlab.methods.selfsupervision": ("self_supervise",),
    "synthlab.training.evaluate": ("compare_models", "evaluate"),
    "synthlab.training.bridges": ("CaTReward",),
    "synthlab.training.contamination": ("claim", "contamination", "split_tasks"),
    "synthlab.scale.export": ("to_dataset", "write_dataset"),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = list(_MODULE)

if TYPE_CHECKING:
    from synthlab.checks.verify import extract_answer, verifier, verify
    from synthlab.core import (Accounting, BadInput, Criterion, Example, Group, Reference, Rollout, Rubric, SynthlabError, Task, Usage,
                               Verdict, new_task)
    from synthlab.lm.backends import Request, Sampling, load_lm
    from synthlab.lm.rollouts import sample
    from synthlab.methods.augment import augment, make_augmenter, mix
    from synthlab.methods.cat import estimate, reward, synthesize
    from synthlab.methods.compare import compare
    from synthlab.methods.selfsupervision import self_supervise
    from synthlab.scale.export import to_dataset, write_dataset
    from synthlab.scoring.groups import group_advantages, kl, majority, pass_at_k
    from synthlab.scoring.logprobs import score
    from synthlab.store import Store
    from synthlab.tasks import load_tasks
    from synthlab.training.bridges import CaTReward
    from synthlab.training.contamination import claim, contamination, split_tasks
    from synthlab.training.evaluate import compare_models, evaluate


def __getattr__(name: str):
    if name not in _MODULE: raise AttributeError(f"module 'synthlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE[name]), name)
    globals()[name] = value
    return value


def __dir__(): return sorted([*globals(), *__all__])
