import { errorCodes, exitFamilies } from "../base/errors.ts";

/** `forge help exit-codes`: the families of base/errors.ts with the codes that lead to each. */
export function exitCodesText(): string {
  const lines = Object.entries(exitFamilies).map(([exit, meaning]) => {
    const codes = Object.entries(errorCodes)
      .filter(([, entry]) => entry.exit === Number(exit))
      .map(([code]) => code);
    return codes.length === 0 ? `${exit.padStart(3)}  ${meaning}` : `${exit.padStart(3)}  ${meaning}\n     ${wrap(codes)}`;
  });
  return ["Exit codes:", ...lines, "130  interrupted with Ctrl-C", "", "`forge exec` exits with the program's own status.", ""].join("\n");
}

function wrap(codes: readonly string[]): string {
  const lines: string[] = [];
  for (const code of codes) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + code.length < 88) lines[lines.length - 1] = `${last}, ${code}`;
    else lines.push(code);
  }
  return lines.join(",\n     ");
}
