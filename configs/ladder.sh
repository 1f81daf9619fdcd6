#!/bin/sh
# Plans every preset of the ladder again, on H100s with native ZeRO, and writes its layout and the table that chose it
# into the file.
#   sh configs/ladder.sh [NAME...]        PYTHON=python3 by default; without names, all of them
set -eu
# Behind the name: GPUs, and what is asked for beside the best (a micro-batch with which more GPUs work as well).
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"

while read -r name gpus more; do
    if [ $# -gt 0 ]; then
        case " $* " in *" $name "*) ;; *) continue ;; esac
    fi
    "$python" -m megapt plan "configs/$name.yaml" --gpus "$gpus" --hardware h100 --backend native $more \
        --write "configs/$name.yaml" </dev/null
done <<'LADDER'
gpt2-124m 1 --only micro=32
llama-1b-1gpu 1
llama-1b 8
llama-8b 32
llama-70b 256
gpt3-175b 512
llama-405b 1024
LADDER
