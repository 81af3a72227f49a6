using System.Globalization;
using System.Net.Sockets;
using System.Text;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Client;

namespace Vmm.Tests.Lab;

/// <summary>Debian's kernel as guest of <c>vmm</c> processes with nested KVM: it boots, answers on its console, and migrates while it works.</summary>
[TestFixture]
[Category(Slow)]
public sealed class LabLinuxTests : LabFixture
{
    private const string Memory = "160M";
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(150);

    [TestCase(1)]
    [TestCase(2)]
    public async Task DebiansKernelBootsToAShellOnTheSerialConsole(int cpus)
    {
        await using var vmm = new VmmCommands { StartDeadline = s_deadline };
        LinuxGuest.WriteInitrd(vmm["initrd"], "exec setsid cttyhack sh");
        PeerProcess vm = await vmm.StartVmOf("vm", Memory, [.. LinuxGuest.Boot(vmm, cpus), "--device", $"serial,socket={vmm["console"]}"]);
        using var console = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        await console.ConnectAsync(new UnixDomainSocketEndPoint(vmm["console"]));
        var output = new StringBuilder();
        await vm.Monitor.Execute("cont", null, CancellationToken.None);
        await Expect(console, output, "/ # ");
        await console.SendAsync("echo $((6 * 7)) processors: $(nproc); warnings\n"u8.ToArray());
        await Expect(console, output, "\nEND\r");
        Assert.That(output.ToString(), Does.Contain($"42 processors: {cpus}\r"));
        Assert.That(Warnings(output.ToString().Replace("\r", "", StringComparison.Ordinal)), Is.Empty);
        await console.SendAsync("poweroff -f\n"u8.ToArray());
        await Expect(console, output, "Power down");
        await Until(vmm, vm, "shutdown");
    }

    [TestCase(1)]
    [TestCase(2)]
    public async Task ALinuxGuestThatComputesAndPrintsMovesLive(int cpus)
    {
        await using var vmm = new VmmCommands { StartDeadline = s_deadline };
        LinuxGuest.WriteInitrd(vmm["initrd"], """
            dd if=/dev/urandom of=/tmp/a bs=64k count=128 2>/dev/null; sum=$(md5sum < /tmp/a)
            ( n=0; while :; do cp /tmp/a /tmp/b; [ "$(md5sum < /tmp/b)" = "$sum" ] && echo "SUM $n ok" || echo "SUM $n WRONG"; n=$((n+1)); usleep 200000; done ) &
            i=0; while [ $i -lt 250 ]; do read up rest < /proc/uptime; echo "BEAT $i $up"; i=$((i+1)); usleep 100000; done
            kill $!; warnings; cat /sys/devices/system/clocksource/clocksource0/current_clocksource
            """);
        PeerProcess to = await vmm.StartVmOf("to", Memory, "--accel", "kvm", "--cpus", $"{cpus}", "--incoming", "tcp:127.0.0.1:0", "--device", $"serial,output={vmm["second"]}");
        PeerProcess from = await vmm.StartVmOf("from", Memory, [.. LinuxGuest.Boot(vmm, cpus), "--device", $"serial,output={vmm["first"]}"]);
        await from.Monitor.Execute("cont", null, CancellationToken.None);
        await LinuxGuest.WaitFor(vmm["first"], "BEAT 20 ", s_deadline);
        await from.Monitor.Execute("migrate", new JsonObject { ["uri"] = to.IncomingUri }, CancellationToken.None);
        await LinuxGuest.WaitFor(vmm["second"], "Power down", s_deadline);
        Assert.That(await vmm.State(from), Is.EqualTo("postmigrate"));
        string first = LinuxGuest.Read(vmm["first"]), second = LinuxGuest.Read(vmm["second"]);
        TestContext.Out.WriteLine(LinuxGuest.Tail(first) + "\n--- moved ---\n" + second[..Math.Min(1500, second.Length)]);
        // The migration may split a line, so join both outputs.
        string all = first + second;
        int[] beats = [.. Regex.Matches(all, @"BEAT (\d+) (\d+\.\d+)\n").Select(static m => int.Parse(m.Groups[1].Value, CultureInfo.InvariantCulture))];
        double[] times = [.. Regex.Matches(all, @"BEAT \d+ (\d+\.\d+)\n").Select(static m => double.Parse(m.Groups[1].Value, CultureInfo.InvariantCulture))];
        Assert.That(beats, Is.EqualTo(Enumerable.Range(0, 250)), () => "heartbeats: " + LinuxGuest.Around(all, "BEAT", beats));
        Assert.That(times, Is.Ordered, "the guest's clock never goes back");
        Assert.That(second, Does.Contain("BEAT 249"));
        Assert.That(Regex.Count(second, @"SUM \d+ ok\n"), Is.GreaterThan(2));
        Assert.That(all, Does.Not.Contain("WRONG"));
        // A pause of more than a second causes a warning too: the guest's clocks count it, and its clocksource watchdog reports it.
        Assert.That(Warnings(all), Is.Empty, $"the kernel's log; downtime {(await from.Monitor.Execute("query-migrate", null, CancellationToken.None))!["downtime"]} ms");
        Assert.That(all, Does.Contain("\nkvm-clock\n"));
    }

    /// <summary>The kernel's warnings about clocks, stalls and bugs. Others, e.g. about missing CPU mitigations, appear in every guest here.</summary>
    private static string[] Warnings(string console)
    {
        int start = console.LastIndexOf("WARNINGS\n", StringComparison.Ordinal), end = console.IndexOf("\nEND", start, StringComparison.Ordinal);
        return [.. console[start..end].Split('\n')[1..].Where(static l => Regex.IsMatch(l, "clocksource|unstable|stall|lockup|skew|hung|WARNING|BUG|Call Trace|unexpected|lost", RegexOptions.IgnoreCase))];
    }

    private static async Task Expect(Socket console, StringBuilder output, string text)
    {
        using var limit = new CancellationTokenSource(s_deadline);
        byte[] buffer = new byte[4096];
        while (!output.ToString().Contains(text, StringComparison.Ordinal))
        {
            int count;
            try
            {
                count = await console.ReceiveAsync(buffer, limit.Token);
            }
            catch (OperationCanceledException)
            {
                count = 0;
            }
            if (count == 0) Assert.Fail($"'{text}' did not appear; the console's end:\n{LinuxGuest.Tail(output.ToString())}");
            output.Append(Encoding.ASCII.GetString(buffer, 0, count));
        }
    }

    private static async Task Until(VmmCommands vmm, PeerProcess vm, string wanted)
    {
        long deadline = Environment.TickCount64 + (long)s_deadline.TotalMilliseconds;
        string state;
        do state = await vmm.State(vm);
        while (state != wanted && Environment.TickCount64 < deadline);
        Assert.That(state, Is.EqualTo(wanted), vm.Errors);
    }
}
