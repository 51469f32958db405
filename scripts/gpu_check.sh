#!/usr/bin/env bash
# What only a GPU can tell, in parts that end together within 24 minutes: docs/gpu-checklist.md says what each is for.
#   scripts/gpu_check.sh pack [TEXT]    where packages can be had: fills build/gpu, which git ignores, for the other machine
#   scripts/gpu_check.sh PART OUTDIR    there: PART is tests, bench, profile, study1 or study2; small json goes to OUTDIR
#   REHEARSE=1 scripts/gpu_check.sh PART OUTDIR    the same commands at tiny sizes, to see on any machine that they run
# TEXT is a folder with *.train.*, *.valid.* and *.test.* of one sentence a line, plain or compressed.
set -euo pipefail
cd "$(dirname "$0")/.."
packed=build/gpu

usage() {
    sed -n '2,6s/^# *//p' "$0" >&2
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
tokens=76800 words=307200 fewer=153600 vocabulary=793471 square=8192 data=20000000 shard=159658
experts=(4 32 256) most=(1024 4096) flat=(32 256) hierarchical=256 most_h=4096 small=()
study=(batch.words=32768 training.num_words=36e6 schedule.warmup_steps=200)
if [ -n "${REHEARSE:-}" ]; then
    tokens=256 words=512 fewer=512 vocabulary=3000 square=128 data=20000 shard=2000 experts=(4 8) most=(16) flat=(4 8) hierarchical=32 most_h=64
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

# Each within its own time: one that hangs must not cost the others theirs.
run() {
    local name=$1 seconds=$2 script=$3
    shift 3
    timeout "$seconds" "$python" "scripts/$script" "$@" --json "$out/$name.json" || echo "$name: no result ($?)" >&2
}

bench() {
    local peers=()
    [ ! -d $packed/peers ] || peers=(--peers $packed/peers)
    run layer 100 benchmark_layer.py --experts "${experts[@]}" --tokens $tokens --square $square "${peers[@]}"
    run layer_large 80 benchmark_layer.py --experts "${most[@]}" --tokens $tokens --square $square "${peers[@]}" \
        --layers moe balanced scattermoe --room 0 --rounds 5
    run training 50 benchmark_training.py --words $words --vocabulary $vocabulary --experts "${flat[@]}" \
        --hierarchical $hierarchical --rounds 5 --overrides "${small[@]}"
    run training_4096 80 benchmark_training.py --words $fewer --vocabulary $vocabulary --experts --hierarchical $most_h \
        --rounds 5 --overrides optimizer.experts=factored machine.recompute=true "${small[@]}"
    run data 40 benchmark_data.py --words $data
    run evaluation 60 benchmark_evaluation.py --tokens $shard --vocabulary $vocabulary --square $square \
        --overrides "${small[@]}"
}

profile() {
    run profile_256 120 benchmark_step.py --model moe_256 --words $words --vocabulary $vocabulary --square $square \
        --profile --overrides "${small[@]}"
}

# One model of the study, for as many words as all others.
train() {
    local name=$1 seconds=$2 runs=${TMPDIR:-/tmp}/gpu-check-runs
    shift 2
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
tests | bench | profile | study1 | study2) [ $# -eq 2 ] || usage ;;
*) usage ;;
esac
mkdir -p "$2"
out=$(cd "$2" && pwd)
prepare
if [ -f $packed/commit ]; then
    COMMIT=$(cat $packed/commit)
    export COMMIT
fi
$part
