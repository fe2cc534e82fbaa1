"""Long jobs on the command line: `python -m helpers fit | score | explore`, alone or under torchrun.

fit and score take the arguments of helpers.jobs.fit and helpers.jobs.score; explore is helpers.explorer.
"""

import argparse
import logging
import os
import signal
import sys
import time

from . import explorer, jobs, ranks
from .influence import PER

EXAMPLES = """examples:
  python -m helpers fit --out out/job                       the bundled model and corpus
  python -m helpers score --factors out/job --out out/job/scores.npy --top 5
  python -m helpers fit --model MODEL --stories STORIES --layers "mlp|attn" --out out/mine
  python -m helpers score --model MODEL --stories STORIES --factors out/mine --out out/mine/scores.npy \\
      --query "One day, Lily" " went to the park."
  torchrun --standalone --nproc-per-node 2 -m helpers fit --out out/job
                                                            the same in two processes, each with half of the stories
  python -m helpers explore --help                          an HTML page of the most influential stories

A job that is stopped, by whatever means, goes on when the same command is given again, and ends with the same numbers.
Under torchrun that takes the same number of processes. What exists and belongs to another job (other weights, data,
layers, seed ...) is refused with a message that says what differs, never used and never overwritten."""


def main(argv=None):
    """The command line; returns the exit status: 1, with one line on stderr, for bad input or a lost process."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["explore"]:
        return explorer.main(argv[1:])
    args = vars(parser().parse_args(argv))
    command, alone = args.pop("command"), int(os.environ.get("WORLD_SIZE", 1)) == 1
    who = command if alone else f"{command}, rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    logging.basicConfig(format=f"%(asctime)s {who}: %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("helpers").setLevel(logging.WARNING if args.pop("quiet") else logging.INFO)
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        return run(command, args)
    except (OSError, ValueError, IndexError) as error:
        print(f"{who}: {error}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        print(f"{who}: stopped{stop}. The same command goes on where it was, from {args['out']}.", file=sys.stderr)
    except RuntimeError as error:
        if alone:
            raise
        print(f"{who}: another rank was lost, or this one failed: {str(error).splitlines()[0]}. The same command, with "
              f"as many ranks, goes on where it was, from {args['out']}.", file=sys.stderr)  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    return 1


def run(command, args):
    """One fit or score, on as many ranks as there are; 0."""
    began = time.perf_counter()
    with ranks.process_group():
        if command == "score":
            args["per"] = args["per"][0] if len(args["per"]) == 1 else tuple(args["per"])
        args["progress"] = ranks.rank() == 0 and sys.stderr.isatty()
        {"fit": jobs.fit, "score": jobs.score}[command](**args)
        if ranks.rank() == 0:
            print(f"{args['out']}: {time.perf_counter() - began:.1f} s")
    return 0


def _stopped(number, frame):
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    raise KeyboardInterrupt(" by SIGTERM" + several * " (under torchrun: another rank has died)")


def parser():
    """The options of fit and score."""
    p = argparse.ArgumentParser(
        prog="python -m helpers", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="EK-FAC factors (fit) and influence scores (score) of many stories, in jobs that can be killed at "
                    "any moment and go on; explore makes an HTML page.")  # fmt: skip
    commands = p.add_subparsers(dest="command", required=True, metavar="fit | score | explore")
    fit = commands.add_parser(
        "fit", help="fit the factors of a model on its stories",
        description="Two passes over the stories: second moments of every layer's inputs and output gradients, then "
                    "eigenvalues. OUT/factors.safetensors is what score reads; OUT/checkpoint holds the running sums "
                    "(about as large as the factors) and may be deleted when the fit is done.")  # fmt: skip
    score = commands.add_parser(
        "score", help="score every story for every query",
        description="One pass over the stories. The scores go to OUT, a .npy file [query, story] (more axes with "
                    "--per) in the order of the stories, while OUT with .json for .npy counts what is there: memory "
                    "does not grow with the stories. numpy.load(OUT, mmap_mode='r') reads them, and OUT "
                    "with .axes.json for .npy says what the axes are.")  # fmt: skip
    for one in (fit, score):
        _shared(one)
    say = fit.add_argument
    say("--out", default="out/job", metavar="DIR", help="where factors and checkpoint go: %(default)s")
    say("--layers", default="mlp", metavar="PATTERN", help="a regular expression over names of layers: %(default)s")
    say("--labels", default="sampled", choices=("sampled", "true"),
        help="sampled: true Fisher, drawn from the model; true: empirical Fisher")  # fmt: skip
    say("--seed", default=0, type=int, help="of the sampled labels: %(default)s")
    _scoring(score.add_argument)
    commands.add_parser("explore", help="write an HTML page of the extreme stories; its options: explore --help")
    return p


def _shared(p):
    say = p.add_argument
    say("--model", default=os.environ.get("TINYSTORIES") or "bundled", help="bundled, hub, a folder, or a hub id: "
        "%(default)s")  # fmt: skip
    say("--stories", default=os.environ.get("STORIES") or None,
        help="bundled, hub, a folder or file (JSON lines, parquet, text), or a dataset id; the model's own if left out")
    say("--limit", type=int, metavar="N", help="only the first N stories; all of a folder, 10,000 of the hub")
    say("--max-length", type=int, default=jobs.MAX_LENGTH, metavar="N", help="most tokens of a story: %(default)s")
    say("--batch-size", type=int, default=16, metavar="N", help="stories in one forward pass: %(default)s")
    say("--device", metavar="NAME", help="such as cpu or cuda:1; by default the rank's own GPU where there is one")
    say("--quiet", action="store_true", help="log warnings only")


def _scoring(say):
    say("--factors", default="out/job", metavar="DIR", help="the folder that fit wrote: %(default)s")
    say("--out", default="out/job/scores.npy", metavar="FILE", help="the scores: %(default)s")
    say("--query", nargs="+", action="append", metavar="TEXT",
        help="PROMPT COMPLETION: whose loss is asked about; PROMPT alone: the model goes on by itself. Repeat for "
             "more. Left out: planted facts (bundled model and stories only)")  # fmt: skip
    say("--per", nargs="+", default=["sequence"], metavar="KIND",
        help=f"{', '.join(per for per in PER if isinstance(per, str))}, or both words of: layer token")  # fmt: skip
    say("--damping", type=float, metavar="X", help="added to every eigenvalue; 0.1 × their mean in each layer if left "
        "out")  # fmt: skip
    say("--rank", type=int, metavar="R", help="cut every preconditioned query gradient to this rank")
    say("--top", type=int, default=0, metavar="K", help="print the K most helpful stories of every query")


if __name__ == "__main__":
    sys.exit(main())
