import { defineConfig } from "vitest/config";

/**
 * unit: fast, parallel, each test in its own folder and namespaces. e2e: boots real microVMs, one file at a time,
 * because emulated VMs that compete for few cores measure only each other.
 */
const endToEnd = ["**/*.e2e.test.ts", "test/e2e/**/*.test.ts"];
const never = ["node_modules/**", "build/**", "dist/**"];

export default defineConfig({
  test: {
    projects: [
      {
        test: {
          name: "unit",
          include: ["{src,tools,test,bench}/**/*.test.ts"],
          exclude: [...never, ...endToEnd],
          setupFiles: ["test/support/properties.ts"],
          testTimeout: 30_000,
          hookTimeout: 30_000,
        },
      },
      {
        test: {
          name: "e2e",
          include: ["{src,test}/**/*.e2e.test.ts", "test/e2e/**/*.test.ts"],
          exclude: never,
          setupFiles: ["test/support/properties.ts"],
          fileParallelism: false,
          testTimeout: 180_000,
          hookTimeout: 300_000,
        },
      },
    ],
  },
});
