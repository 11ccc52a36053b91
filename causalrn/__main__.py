"""The command `causalrn VERB ...`: `causalrn fit ...` is `python -m causalrn.fit ...`."""

import runpy
import sys

# Each verb, the module that is run, and what it does.
VERBS = {
    "fit": ("causalrn.fit", "trains a model as a config says"),
    "evaluate": (
        "causalrn.evaluate",
        "measures a checkpoint on its validation data, at other lengths, or on tasks",
    ),
    "generate": ("causalrn.generate", "continues a prompt with a trained model"),
    "export": ("causalrn.export", "turns checkpoints into other formats, and other formats into checkpoints"),
    "report": ("causalrn.report", "shows runs as a page, and the inside of models"),
    "sweep": ("causalrn.sweep", "runs a grid of trainings and collects one table"),
    "prepare": ("datamodules.prepare", "turns text into shards of tokens"),
    "doctor": ("causalrn.doctor", "checks this installation and its operators on this machine"),
}


def main() -> None:
    """Runs the verb in this process, as `python -m` would."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("usage: causalrn VERB ...\n")
        for name, (_, purpose) in VERBS.items():
            print(f"  {name:10} {purpose}")
        print("\ncausalrn VERB --help tells more.")
        return
    if verb not in VERBS:
        print(f"error: {verb} is no verb: want one of {', '.join(VERBS)}", file=sys.stderr)
        raise SystemExit(2)
    module = VERBS[verb][0]
    # Lightning starts further processes by this name.
    sys.argv = [f"{sys.argv[0]} {verb}", *sys.argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
