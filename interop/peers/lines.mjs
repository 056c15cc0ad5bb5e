// Requests on stdin, answers on stdout, one JSON object per line: {id, op, ...} -> {id, value} or {id, error}.
// Requests run side by side; the end of stdin ends the process, so a client never outlives its runner.
import { createInterface } from 'node:readline';

const answer = (fields) => process.stdout.write(JSON.stringify(fields) + '\n');

const counts = new Map();

// What happened without being asked for: a line for each, numbered among those of its kind and name.
export function tell(event, name, fields = {}) {
    const nth = (counts.get(`${event} ${name}`) ?? 0) + 1;
    counts.set(`${event} ${name}`, nth);
    answer({ event, name, nth, ...fields });
}

export async function serve(operations, shutdown = async () => {}) {
    answer({ id: 0, value: 'ready' });
    for await (const line of createInterface({ input: process.stdin })) {
        const { id, op, ...fields } = JSON.parse(line);
        Promise.resolve()
            .then(() => operations[op](fields))
            .then((value) => answer({ id, value: value ?? null }))
            .catch((error) => answer({ id, error: String(error?.message ?? error) }));
    }
    await shutdown();
    process.exit(0);
}
