#!/usr/bin/env bash
# What only a GPU can tell, in parts that end together within 24 minutes: docs/gpu-checklist.md says what each is for.
#   scripts/gpu_check.sh pack [TEXT]    where packages can be had: fills build/gpu, which git ignores, for the other machine
#   scripts/gpu_check.sh PART OUTDIR [NAME ...]    there: PART is tests, bench, profile, study1 or study2; small json goes
#                                       to OUTDIR. Of bench and the studies these alone: layer_4096, moe_4096_h, ...
#   REHEARSE=1 scripts/gpu_check.sh PART OUTDIR    the same commands at tiny sizes, to see on any machine that they run
# TEXT is a folder with *.train.*, *.valid.* and *.test.* of one sentence a line, plain or compressed.
set -euo pipefail
cd "$(dirname "$0")/.."
packed=build/gpu

usage() {
    sed -n '2,7s/^# *//p' "$0" >&2
    exit 2
}

pack() {
    local build=${PYTHON:-python3} text=${1:-}
    rm -rf $packed && mkdir -p $packed/wheels $packed/text
    "$build" -m pip wheel -q --no-deps -w $packed/wheels antlr4-python3-runtime==4.9.3 # on PyPI as source alone
    "$build" -m pip download -q --no-deps -d $packed/wheels hydra-core==1.3.7 omegaconf==2.3.1
    "$build" -m pip download -q --no-deps -d $packed/wheels --only-binary=:all: --python-version "${GPU_PYTHON:-3.12}" \
        --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 zstandard==0.25.0
    if [ -n "$text" ]; then
        cp "$text"/*.train.* "$text"/*.valid.* "$text"/*.test.* $packed/text/
    fi
    git rev-parse --short HEAD >$packed/commit
    du -sh $packed
}

# Tokens of a layer, words of a step, of the vocabulary and of a study, ...
tokens=76800 words=307200 vocabulary=793471 square=8192 data=20000000 shard=159658
experts=(4 32 256) many=1024 most=4096 flat=(32 256) hierarchical=256 most_h=4096 small=()
study=(batch.words=32768 training.num_words=36e6 schedule.warmup_steps=200)
if [ -n "${REHEARSE:-}" ]; then
    tokens=256 words=512 vocabulary=3000 square=128 data=20000 shard=2000 experts=(4 8) many=16 most=32 flat=(4 8) hierarchical=32 most_h=64
    small=(model.width=16 model.expert_hidden=16)
    study=(batch.words=1000 training.num_words=20000 schedule.warmup_steps=20 softmax.num_sampled=64 vocabulary.max_size=2000 "${small[@]}")
fi

# The environment's Python where there is one, else the machine's own with the packed wheels beside it.
python=.venv/bin/python
prepare() {
    [ -x $python ] && return
    python=${PYTHON:-python3}
    local site=${TMPDIR:-/tmp}/gpu-check-site
    [ -d "$site" ] || "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" $packed/wheels/*.whl
    export PYTHONPATH=$site:$PWD
}

tests() {
    local at_once=()
    ! "$python" -c "import xdist" 2>/dev/null || at_once=(-n 8)
    # Of many threads each a process would wait for the other processes'.
    OMP_NUM_THREADS=2 timeout 180 "$python" -m pytest -q -W default -p no:cacheprovider "${at_once[@]}" tests/gpu 2>&1 |
        tail -n 60 | tee "$out/tests.txt"
}

# Whether this is to be done, of those in a part.
asked() {
    [[ ${#names[@]} -eq 0 || " ${names[*]} " == *" $1 "* ]] && done_any=1
}

# Each within its own time: one that hangs must not cost the others theirs.
run() {
    local name=$1 seconds=$2 script=$3
    shift 3
    asked "$name" || return 0
    timeout "$seconds" "$python" "scripts/$script" "$@" --json "$out/$name.json" || echo "$name: no result ($?)" >&2
}

bench() {
    local peers=()
    [ ! -d $packed/peers ] || peers=(--peers $packed/peers)
    run layer 100 benchmark_layer.py --experts "${experts[@]}" --tokens $tokens --square $square "${peers[@]}"
    run layer_1024 50 benchmark_layer.py --experts $many --tokens $tokens --square $square "${peers[@]}" \
        --layers moe balanced moe_bfloat16 scattermoe scattermoe_float32 --room 4 --rounds 5
    # Of 4 G parameters two layers at a time: with gradients 34 GB in float32, 17 in bfloat16.
    run layer_4096 50 benchmark_layer.py --experts $most --tokens $tokens --square $square "${peers[@]}" \
        --layers moe scattermoe --room 0 --rounds 3
    run training 50 benchmark_training.py --words $words --vocabulary $vocabulary --experts "${flat[@]}" \
        --hierarchical $hierarchical --rounds 5 --overrides "${small[@]}"
    local words_4096 recompute
    read -r words_4096 recompute < <(room_for_4096)
    run training_4096 80 benchmark_training.py --words "$words_4096" --vocabulary $vocabulary --experts \
        --hierarchical $most_h --rounds 5 --overrides optimizer.experts=factored "machine.recompute=$recompute" "${small[@]}"
    run data 40 benchmark_data.py --words $data
    run evaluation 50 benchmark_evaluation.py --tokens $shard --vocabulary $vocabulary --square $square \
        --overrides "${small[@]}"
}

profile() {
    run profile_256 120 benchmark_step.py --model moe_256 --words $words --vocabulary $vocabulary --square $square \
        --profile --overrides "${small[@]}"
}

# Words of a batch of MoE-4096-h and whether to recompute: weights and gradients of 4 G parameters with a copy in bfloat16
# take 43 GB, 307,200 words some 40 beside it.
room_for_4096() {
    local gib
    gib=$("$python" -c "import torch; print(torch.cuda.mem_get_info()[1] >> 30 if torch.cuda.is_available() else 0)")
    if [ "$gib" -ge 120 ] || [ -n "${REHEARSE:-}" ]; then echo $words false; else echo $((words / 2)) true; fi
}

# One model of the study, for as many words as all others.
train() {
    local name=$1 seconds=$2 runs=${TMPDIR:-/tmp}/gpu-check-runs
    shift 2
    asked "$name" || return 0
    rm -rf "${runs:?}/$name" # of another time: its result would pass for this one's
    timeout "$seconds" "$python" -m moe_lm train "$@" "${study[@]}" name="$name" runs="$runs" corpus=text \
        "corpus.train=$packed/text/*.train.*" "corpus.valid=$packed/text/*.valid.*" "corpus.test=$packed/text/*.test.*" \
        training.log_every=50 training.valid_every=1000 checkpoint.every_seconds=100000 checkpoint.keep_last=1 ||
        echo "$name: stopped ($?)" >&2
    for file in result.json metrics.jsonl; do
        [ ! -f "$runs/$name/$file" ] || cp "$runs/$name/$file" "$out/$name.$file"
    done
}

study1() {
    train moe_1_wide 140 model=moe_1_wide
    train moe_4 140 model=moe_4
    train moe_32 140 model=moe_32
}

study2() {
    train moe_256 160 model=moe_256
    train moe_4096_h 200 model=moe_4096_h optimizer.experts=factored machine.recompute=true
}

[ $# -ge 1 ] || usage
part=$1
case $part in
pack)
    pack "${2:-}"
    exit
    ;;
bench | study1 | study2) [ $# -ge 2 ] || usage ;;
tests | profile) [ $# -eq 2 ] || usage ;;
*) usage ;;
esac
mkdir -p "$2"
out=$(cd "$2" && pwd)
names=("${@:3}") done_any=
prepare
if [ -f $packed/commit ]; then
    COMMIT=$(cat $packed/commit)
    export COMMIT
fi
$part
if [ ${#names[@]} -gt 0 ] && [ -z "$done_any" ]; then
    echo "$part has nothing of the name ${names[*]}" >&2
    exit 2
fi
