import { ForgeError } from "../base/errors.ts";
import { commands, groups } from "./commands.ts";
import type { Cli } from "./index.ts";

/** `forge completion`: words of commands and their flags. zsh reads the bash script through its own bashcompinit. */
export async function completion({ terminal }: Cli, shell: string): Promise<void> {
  if (shell !== "bash" && shell !== "zsh") throw new ForgeError("USAGE", `there is completion for bash and zsh, not for ${shell}`);
  const script = bashScript();
  terminal.document({ shell, script });
  terminal.print(shell === "bash" ? script : `autoload -Uz +X compinit bashcompinit\ncompinit\nbashcompinit\n${script}`);
}

function bashScript(): string {
  const nameOf = (words: string): string => words.split(" ")[0] ?? "";
  const cases = commands.map(({ group, words, options }) => {
    const flags = (options ?? []).map((option) => option().long ?? "").concat("--json", "--help");
    return `    "${group === undefined ? nameOf(words) : `${group} ${nameOf(words)}`}") words="${flags.join(" ")}" ;;`;
  });
  const groupCases = Object.keys(groups).map((group) => {
    const verbs = commands.filter((entry) => entry.group === group).map(({ words }) => nameOf(words));
    return `    "${group}"|"${group} ") words="${verbs.join(" ")}" ;;`;
  });
  const first = [...Object.keys(groups), ...commands.filter(({ group }) => group === undefined).map(({ words }) => nameOf(words)), "help"];
  return `_forge() {
  local current="\${COMP_WORDS[COMP_CWORD]}" words=""
  local one="\${COMP_WORDS[1]}" two="\${COMP_WORDS[2]}"
  case "$one" in
    ${Object.keys(groups).join("|")}) [ "$COMP_CWORD" -gt 2 ] && one="$one $two" ;;
  esac
  [ "$COMP_CWORD" -eq 1 ] && one=""
  case "$one" in
    "") words="${first.join(" ")}" ;;
${groupCases.join("\n")}
${cases.join("\n")}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  [ \${#COMPREPLY[@]} -eq 0 ] && COMPREPLY=($(compgen -f -- "$current"))
}
complete -F _forge forge ./forge`;
}
