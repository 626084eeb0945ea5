import { type AgentOptions, NodeAgent } from "./node-agent.ts";

export type { AgentOptions } from "./node-agent.ts";

/**
 * The node agent's process. SIGTERM and SIGINT end the agent and leave the cells running; SIGUSR2 stops every cell,
 * leaves nothing behind, and then ends.
 */
export async function runAgent(options: AgentOptions): Promise<void> {
  const agent = await NodeAgent.open(options);
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.once(signal, () => void agent.stop());
  process.once("SIGUSR2", () => void agent.stopCells());
  await agent.run();
}
