// Headless Chromium with one page, driven by lines on stdin (lines.mjs). Usage: node chromium.mjs EXECUTABLE PROFILE_DIR
// The socket operations run inside the page; the others act on it as a person would.
import { readFileSync } from 'node:fs';
import { chromium } from 'playwright-core';
import { serve } from './lines.mjs';

const [executablePath, profile] = process.argv.slice(2);
const context = await chromium.launchPersistentContext(profile, {
    executablePath,
    // Everything Chromium would say to the outside by itself is off: the traffic of a test stays on loopback.
    args: [
        '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
        '--disable-component-update', '--ignore-certificate-errors', '--disable-sync', '--disable-dev-shm-usage',
    ],
});
const page = await context.newPage();
// What really came over the wire, whatever a page shows of it.
const frames = [];
page.on('websocket', (websocket) => websocket.on('framereceived', ({ payload }) => frames.push(String(payload))));
const script = readFileSync(new URL('./socket.js', import.meta.url), 'utf8');
// What a page has to complain about: errors of its script, what its policy forbids, what it could not load.
const complaints = [];
page.on('console', (message) => { if (['error', 'warning'].includes(message.type())) complaints.push(message.text()); });
page.on('pageerror', (error) => complaints.push(String(error)));

const operations = {
    async page({ url }) {
        const response = await page.goto(url, { waitUntil: 'load', timeout: 15000 });
        await page.evaluate(`${script}; globalThis.operations = socketOperations(WebSocket); null`);
        return { status: response.status(), title: await page.title() };
    },
    // Waits until the element has or contains a text, and returns what it contains.
    async text({ selector, contains, is }) {
        const seen = () => page.evaluate((s) => document.querySelector(s)?.textContent.trim() ?? null, selector);
        await page.waitForFunction(
            ([selector, contains, is]) => {
                const text = document.querySelector(selector)?.textContent.trim() ?? '';
                return is === null ? text.includes(contains) : text === is;
            },
            [selector, contains ?? null, is ?? null],
            { timeout: 10000 },
        ).catch(async (error) => {
            throw new Error(`${selector} has ${JSON.stringify(await seen())}, not "${is ?? contains}" (${error.name})`);
        });
        return seen();
    },
    async framesReceived() { return frames.filter((payload) => payload.length < 1000).slice(-20); },
    async fill({ selector, value }) { await page.fill(selector, value, { timeout: 5000 }); },
    async press({ selector, key }) { await page.press(selector, key, { timeout: 5000 }); },
    async click({ selector }) { await page.click(selector, { timeout: 5000 }); },
    async screenshot({ path, full }) { await page.screenshot({ path, fullPage: full ?? false }); },
    async look({ width, height, scheme }) {
        await page.setViewportSize({ width, height });
        await page.emulateMedia({ colorScheme: scheme });
    },
    // The texts of a table's body, row by row.
    async rows({ selector }) {
        return page.evaluate((s) => [...document.querySelectorAll(`${s} tbody tr`)].map(
            (row) => [...row.cells].map((cell) => cell.innerText.trim())), selector);
    },
    async count({ selector }) { return page.locator(selector).count(); },
    async attribute({ selector, name }) { return page.getAttribute(selector, name, { timeout: 5000 }); },
    async isVisible({ selector }) { return page.isVisible(selector); },
    // How far it can be scrolled sideways.
    async sideways() { return page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth); },
    async complaints() { return complaints.splice(0); },
    // What axe-core finds that is serious or critical: the rule, and where.
    async axe() {
        // By the debugger, since the page's own policy lets no other script in.
        await page.evaluate(readFileSync(new URL('../node_modules/axe-core/axe.min.js', import.meta.url), 'utf8'));
        const { violations, passes } = await page.evaluate(() => globalThis.axe.run());
        const found = violations.map(({ id, impact, nodes }) => `${impact} ${id}: ${nodes.map(({ target }) => target.join(' ')).join(', ')}`);
        return { serious: found.filter((text) => /^(serious|critical)/.test(text)), all: found, passes: passes.length };
    },
};
for (const op of ['open', 'send', 'receive', 'echo', 'burst', 'close', 'closed']) {
    operations[op] = (fields) => page.evaluate(([op, fields]) => globalThis.operations[op](fields), [op, fields]);
}

await serve(operations, () => context.close());
