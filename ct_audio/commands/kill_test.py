"""Show that `kill -9` does no harm to training, see `experiments.kill_resume`."""

from ct_audio.commands.command_line import build_parser
from ct_audio.common.errors import UserError


def main() -> int:
    """Parse, run both trainings and compare them; exit status 1 if a bit differs."""
    parser = build_parser("Kill a training run again and again and compare it with one that was left alone.")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="number of kill -9")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="1, or as many under torchrun: 2 or 4")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="training steps, even")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        raise UserError(f"--kills: expected at least 1, got {arguments.kills}")
    if arguments.processes not in (1, 2, 4):
        raise UserError(f"--processes: expected 1, 2 or 4, parts of the run's 4 lanes, got {arguments.processes}")
    if arguments.steps < 2 or arguments.steps % 2:
        raise UserError(f"--steps: expected an even number of at least 2, got {arguments.steps}")
    from ct_audio.experiments.kill_resume import kill_and_compare

    different = kill_and_compare(
        num_kills=arguments.kills, num_processes=arguments.processes, num_steps=arguments.steps, seed=arguments.seed
    )
    found = f"{len(different)} tensors differ {different[:5]}"
    print(f"{arguments.kills} kills, {arguments.processes} process(es): {found}")
    return 1 if different else 0
