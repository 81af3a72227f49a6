using System.Net.Sockets;
using System.Text;
using Vmm.Core.Errors;
using Vmm.Migration.Update;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Migration.Update;

/// <summary>The new process reports its progress to the old one, and the old one refuses everything that is no report.</summary>
[TestFixture]
public class UpdateReportsTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    [Test]
    public async Task BothReportsArriveOneConnectionEach()
    {
        using var folder = new TempDirectory();
        using var reports = new UpdateReports(folder["reports"]);
        UpdateReports.SendListening(folder["reports"]);
        await reports.Listening.WaitAsync(s_deadline);
        Assert.That(reports.Running.IsCompleted, Is.False);
        UpdateReports.SendRunning(folder["reports"], 7_000_000_001);
        Assert.That(await reports.Running.WaitAsync(s_deadline), Is.EqualTo((Environment.ProcessId, 7_000_000_001)));
    }

    [Test]
    public async Task AProcessThatHoldsTheVmEndsTheWaitForItsStart()
    {
        using var folder = new TempDirectory();
        using var reports = new UpdateReports(folder["reports"]);
        UpdateReports.SendListening(folder["reports"]);
        await reports.Listening.WaitAsync(s_deadline);
        UpdateReports.SendHeld(folder["reports"]);
        Assert.That(async () => await reports.Running.WaitAsync(s_deadline),
            Throws.TypeOf<MigrationFailedException>().With.Message.Contains($"process {Environment.ProcessId} has the VM and keeps it paused").And.Property("Hint").Contains("--force"));
    }

    [TestCase("nonsense\n")]
    [TestCase("running\n")]
    [TestCase("running 1 -2\n")]
    [TestCase("held me\n")]
    [TestCase("listening to music\n")]
    [TestCase("0123456789012345678901234567890123456789012345678901234567890123456789")]
    public void WhatIsNoReportFailsTheUpdateAndIsNamed(string line)
    {
        using var folder = new TempDirectory();
        using var reports = new UpdateReports(folder["reports"]);
        using (var peer = Connect(folder["reports"])) peer.Send(Encoding.ASCII.GetBytes(line));
        Assert.That(async () => await reports.Listening.WaitAsync(s_deadline), Throws.TypeOf<MigrationFailedException>().With.Message.Contains(line.TrimEnd()[..7]));
    }

    [Test]
    public async Task APeerThatSaysNothingIsIgnored()
    {
        using var folder = new TempDirectory();
        using var reports = new UpdateReports(folder["reports"]);
        Connect(folder["reports"]).Dispose();
        UpdateReports.SendListening(folder["reports"]);
        await reports.Listening.WaitAsync(s_deadline);
    }

    [Test]
    public void NobodyListensAnyMoreAndTheReportIsDropped()
    {
        using var folder = new TempDirectory();
        new UpdateReports(folder["reports"]).Dispose();
        Assert.That(folder["reports"], Does.Not.Exist);
        Assert.That(() => UpdateReports.SendRunning(folder["reports"], 1), Throws.Nothing);
    }

    private static Socket Connect(string path)
    {
        var peer = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        peer.Connect(new UnixDomainSocketEndPoint(path));
        return peer;
    }
}
